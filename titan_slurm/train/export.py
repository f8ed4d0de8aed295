"""The weights after the last step in Hugging Face's format: safetensors, with config.json and tokenizer beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from torchtitan.components.checkpoint import MODEL, CheckpointManager
from torchtitan.tools.logging import logger

from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import sync_directory, sync_file
from titan_slurm.train.agreement import agreement

_LARGEST_FILE = 5 * 2**30
_OF_A_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"
)  # fmt: skip


def export(
    checkpointer: CheckpointManager, run: RunDirectory, step: int, *, config: dict[str, Any] | None, tokenizer: Path
) -> None:
    """Write the model's weights into the run's `export/step-N`, which is there whole or not at all.

    Collective. In checkpoint.export_dtype; `config` is the model's config.json, where one is known, and `tokenizer` a
    folder. Nothing is done where that step is exported already.
    """
    folder = run.export_folder / f"step-{step}"
    if agreement().from_rank_0(folder.is_dir()):
        return
    partial = run.export_folder / f".step-{step}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    agreement().gather(None)
    _write_weights(checkpointer, partial)
    if dist.get_rank() == 0:
        shutil.rmtree(partial / "sharded")
        _write_beside(partial, checkpointer.export_dtype, config, tokenizer)
        for file in partial.iterdir():
            sync_file(file)
        sync_directory(partial)
        partial.rename(folder)
        sync_directory(run.export_folder)
        logger.info(f"The weights of step {step} are exported to {folder}")
    agreement().gather(None)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _write_weights(checkpointer: CheckpointManager, folder: Path) -> None:
    dtype = checkpointer.export_dtype
    states = {
        name: state.to(dtype) if isinstance(state, torch.Tensor) and state.is_floating_point() else state
        for name, state in checkpointer.states[MODEL].state_dict().items()
    }
    weights = checkpointer.sd_adapter.to_hf(states)
    if any("expert_bias" in name for name in states) and not any(name.endswith("correction_bias") for name in weights):
        logger.warning(
            "torchtitan balances this model's experts by a bias of its routers, which Hugging Face's format has no "
            "place for: the exported model may send tokens to other experts."
        )
    files = _files(weights)
    # Each rank writes what it has, and then puts some of the files together from the parts.
    writer = HuggingFaceStorageWriter(str(folder / "sharded"), files, save_distributed=True)
    dcp.save(weights, storage_writer=writer, process_group=checkpointer.pg)
    consolidate_safetensors_files_on_every_rank(
        str(folder / "sharded"), str(folder), files, num_threads=4, process_group=checkpointer.pg
    )


def _files(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number of the file, from 1, for each weight of the whole model: a rank knows only some of them."""
    own = {name: weight.numel() * weight.element_size() for name, weight in weights.items()}
    sizes: dict[str, int] = {}
    for part in agreement().gather(own):
        sizes |= part
    files: dict[str, int] = {}
    number, filled = 1, 0
    for name, size in sizes.items():
        if filled and filled + size > _LARGEST_FILE:
            number, filled = number + 1, 0
        files[name] = number
        filled += size
    return files


def _write_beside(folder: Path, dtype: torch.dtype, config: dict[str, Any] | None, tokenizer: Path) -> None:
    if config is None:
        logger.warning("The export has no config.json: which one it would be is not known for this model.")
    else:
        text = json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2)
        (folder / "config.json").write_text(text + "\n")
    for pattern in _OF_A_TOKENIZER:
        for file in tokenizer.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
