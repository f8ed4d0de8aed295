"""Recipe × place → plan. Checks what only this machine can tell: paths, folders, GPUs."""

import secrets
import tempfile
from pathlib import Path
from typing import Any

from titan_slurm.cluster import local
from titan_slurm.errors import BadInputError, Problem, did_you_mean
from titan_slurm.recipe.layout import OPTIONAL_SIZES, SIZES, model_shape
from titan_slurm.recipe.mapping import (
    MAP_STYLE_DATASETS,
    activation_checkpointing,
    optimizer_values,
    torchtitan_values,
)
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan

CLUSTERS = ("local", "slurm")
_BUILT_IN_VOCAB_SIZE = 2048
# 256 bytes and two special tokens.
_SMALLEST_VOCAB_SIZE = 258
_TEXT_FILES = (".jsonl", ".txt", ".parquet")


def make_plan(
    resolved: ResolvedRecipe, run: RunDirectory, cluster: str, *, elsewhere: list[Problem] | None = None
) -> Plan:
    """The plan of a run that is to stand at `run`. Raises BadInputError with everything that cannot work here; where
    `elsewhere` is given, for a script that is only shown, it is added there instead."""
    problems: list[Problem] = []
    recipe, layout = resolved.recipe, resolved.layout
    device = _device(resolved, cluster, problems)
    torchtitan = torchtitan_values(recipe, layout, resolved.torchtitan, device=device)
    torchtitan["checkpoint.folder"] = str(_save_folder(resolved, run, problems))
    torchtitan |= _start_from(resolved, problems)
    data = _data(resolved, problems)
    if elsewhere is not None:
        elsewhere += problems
    elif problems:
        raise BadInputError(problems)
    return Plan(
        name=run.name,
        run_id=f"{run.name[:40]}-{secrets.token_hex(4)}",
        recipe=resolved.name,
        recipe_version=recipe.recipe.version,
        cluster=cluster,
        device=device,
        layout=layout,
        model=_model(resolved),
        data=data,
        optimizer=optimizer_values(recipe),
        activation_checkpointing=activation_checkpointing(recipe),
        wandb=recipe.wandb.model_dump(),
        torchtitan=torchtitan,
        slurm=recipe.slurm.model_dump(),
        requeue=recipe.requeue.model_dump(),
        values={".".join(key): {"value": each.value, "from": each.origin} for key, each in resolved.values.items()},
    )


def _model(resolved: ResolvedRecipe) -> dict[str, Any]:
    model = resolved.recipe.model
    if model.flavor:
        return {"name": model.name, "flavor": model.flavor}
    shape = model_shape(resolved.recipe) or {}
    return {"name": model.name, "sizes": {name: shape[name] for name in (*SIZES, *OPTIONAL_SIZES)}}


def _data(resolved: ResolvedRecipe, problems: list[Problem]) -> dict[str, Any]:
    data = resolved.recipe.data
    vocab_size = (model_shape(resolved.recipe) or {}).get("vocab_size", _BUILT_IN_VOCAB_SIZE)
    tokenizer, path = data.tokenizer, data.dataset_path
    if tokenizer != "python_docs":
        tokenizer = str(Path(tokenizer).expanduser().absolute())
        if not Path(tokenizer).is_dir():
            hint = "a folder with tokenizer.json; torchtitan's scripts/download_hf_assets.py fetches one"
            problems.append(_problem(resolved, "data", "tokenizer", f"there is no folder {tokenizer}", hint))
    elif vocab_size < _SMALLEST_VOCAB_SIZE:
        what = f"the model's vocabulary of {vocab_size} is too small for the built-in tokenizer"
        problems.append(_problem(resolved, "model", "vocab_size", what, f"at least {_SMALLEST_VOCAB_SIZE}"))
    if path and data.dataset in MAP_STYLE_DATASETS:
        path = str(Path(path).expanduser().absolute())
        _check_own_data(resolved, Path(path), problems)
    elif path and Path(path).exists():
        path = str(Path(path).absolute())
    return {
        "dataset": data.dataset,
        "dataset_path": path,
        "map_style": data.dataset in MAP_STYLE_DATASETS,
        "tokenizer": tokenizer,
        "tokenizer_vocab_size": min(_BUILT_IN_VOCAB_SIZE, vocab_size),
    }


def _check_own_data(resolved: ResolvedRecipe, path: Path, problems: list[Problem]) -> None:
    if not path.exists():
        problems.append(_problem(resolved, "data", "dataset_path", f"there is no {path}"))
    elif resolved.recipe.data.dataset == "tokens" and not (path / "tokens.json").is_file():
        hint = "the assets/tokens folder of a run that has tokenized it"
        problems.append(_problem(resolved, "data", "dataset_path", f"{path} holds no prepared tokens", hint))
    elif resolved.recipe.data.dataset == "text":
        files = path.rglob("*") if path.is_dir() else [path]
        if not any(file.suffix in _TEXT_FILES for file in files):
            hint = f"known are {', '.join(_TEXT_FILES)}"
            problems.append(_problem(resolved, "data", "dataset_path", f"{path} holds no text", hint))


def _device(resolved: ResolvedRecipe, cluster: str, problems: list[Problem]) -> str:
    wanted = resolved.recipe.slurm.gpus_per_node
    if cluster == "slurm" or wanted == 0:
        return "cuda" if wanted else "cpu"
    here = local.gpu_count()
    # A recipe for a GPU cluster, tried on a laptop: the CPU is the only thing to try it on.
    if here and resolved.layout.world_size > here:
        what = f"{resolved.layout.world_size} ranks on this machine, which has {here} GPUs"
        problems.append(_problem(resolved, "slurm", "gpus_per_node", what, f"--set slurm.gpus_per_node={here}"))
    return "cuda" if here else "cpu"


def _save_folder(resolved: ResolvedRecipe, run: RunDirectory, problems: list[Problem]) -> Path:
    """Where checkpoints go. A folder that two runs shared would let one resume from the other's."""
    given = Path(resolved.recipe.checkpointing.save_dir).expanduser()
    if not given.is_absolute():
        return run.path / given
    existing = next(folder for folder in (given, *given.parents) if folder.exists())
    try:
        # Only trying tells: root may write everywhere, says os.access, in /proc and on a read-only mount too.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        what = f"{existing} cannot be written: {error.strerror}"
        problems.append(_problem(resolved, "checkpointing", "save_dir", what))
    return given / run.name


def _start_from(resolved: ResolvedRecipe, problems: list[Problem]) -> dict[str, Any]:
    given = resolved.recipe.checkpointing.resume_from_checkpoint
    if not given:
        return {}
    folder = Path(given).expanduser().absolute()
    if not (folder / ".metadata").is_file():
        steps = [path.name for path in folder.glob("step-*")] if folder.is_dir() else []
        hint = did_you_mean(folder.name, steps) or "a step-N folder of a run's checkpoints"
        what = f"there is no checkpoint in {folder}"
        problems.append(_problem(resolved, "checkpointing", "resume_from_checkpoint", what, hint))
    return {"checkpoint.initial_load_path": str(folder)}


def _problem(resolved: ResolvedRecipe, section: str, field: str, what: str, hint: str = "") -> Problem:
    value = resolved.values.get((section, field))
    where = value.origin if value else str(resolved.found.path)
    return Problem(where, f"{section}.{field}: {what}", hint)
