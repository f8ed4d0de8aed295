"""One rank's life, from the first line of its process to its last. What it trains lives in the modules beside this one.

Nothing heavy is imported before `live` runs: torch reads the environment when it is imported, so the environment has to
be right first.
"""

import os
import traceback
from pathlib import Path

from titan_slurm.run.attempt import ATTEMPT_VARIABLE, Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan

# What the launcher calls rank, local rank and number of ranks.
_LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
)


def live(run_path: str) -> None:
    """Train the run at `run_path` as the rank that the environment names, to its last step.

    Leaves `finished.json` (rank 0) or `error_rank_N.json` in the attempt's folder; an error is raised again, so that
    the process ends with a code other than 0.
    """
    run = RunDirectory(Path(run_path))
    attempt = Attempt(Path(os.environ[ATTEMPT_VARIABLE]))
    rank, world_size = _enter_distributed_environment()
    try:
        plan = run.plan()
        if world_size != plan.layout.world_size:
            raise RuntimeError(f"the plan is for {plan.layout.world_size} ranks, but {world_size} were started")
        _set_environment(plan, run)
        _train(plan, run, attempt, rank, world_size)
    except BaseException as error:
        attempt.report_error(rank, f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc())
        raise


def _train(plan: Plan, run: RunDirectory, attempt: Attempt, rank: int, world_size: int) -> None:
    if plan.device == "cpu":
        from titan_slurm.train import cpu

        cpu.install()
    elif not _cuda_is_available():
        raise RuntimeError("the plan asks for GPUs, but torch finds none here; a CPU run needs slurm.gpus_per_node = 0")

    import torch.distributed
    from torchtitan.tools.logging import init_logger

    from titan_slurm.train import data, rendezvous
    from titan_slurm.train.trainer import build_trainer

    init_logger()
    data.register()
    store = rendezvous.meet(attempt, rank, world_size)
    rendezvous.once(store, "assets", rank, lambda: data.prepare_assets(run, plan))
    trainer = build_trainer(plan, run, attempt)
    try:
        trainer.train()
        if trainer.step < plan.max_steps:
            raise RuntimeError(f"the data ran out after step {trainer.step} of {plan.max_steps}")
        torch.distributed.barrier()
        if rank == 0:
            attempt.finish(trainer.step)
    finally:
        trainer.close()
    torch.distributed.destroy_process_group()


def _enter_distributed_environment() -> tuple[int, int]:
    """Set RANK, LOCAL_RANK and WORLD_SIZE as torch expects them. Returns rank and world size."""
    for names in _LAUNCHERS:
        if all(name in os.environ for name in names):
            rank, local_rank, world_size = (int(os.environ[name]) for name in names)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
            return rank, world_size
    raise RuntimeError("neither Slurm nor the local launcher says which rank this is")


def _set_environment(plan: Plan, run: RunDirectory) -> None:
    wandb = plan.wandb
    os.environ.update(
        # Only the rank that logs the loss needs torchtitan's own warning about it; every rank has a log file here.
        LOG_RANK=",".join(map(str, range(plan.layout.world_size))),
        # The data comes from local files or is streamed; whoever wants the hub's tokenizer names a folder.
        TOKENIZERS_PARALLELISM="false",
        WANDB_RUN_ID=plan.run_id,
        WANDB_RESUME="allow",
        WANDB_RUN_NAME=plan.name,
        WANDB_PROJECT=wandb["project"],
        WANDB_MODE=wandb["mode"] if wandb["mode"] != "auto" else _wandb_mode(),
        # wandb's own files in the user's home would be written by every node at once.
        WANDB_DATA_DIR=str(run.path / "wandb" / "data"),
        WANDB_CACHE_DIR=str(run.path / "wandb" / "cache"),
        # wandb prints to the log of one rank; its banner is for terminals.
        WANDB_SILENT="true",
    )
    for name, value in (
        ("WANDB_TEAM", wandb["entity"]),
        ("WANDB_RUN_GROUP", wandb["group"]),
        # Not WANDB_RUN_TAGS: torchtitan hands its text to wandb as it is, and wandb takes each letter for a tag.
        ("WANDB_TAGS", ",".join(wandb["tags"])),
    ):
        if value:
            os.environ[name] = value


def _wandb_mode() -> str:
    """`online` where a key is at hand, `offline` where there is none: a batch job cannot ask for it."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    return "online" if has_key else "offline"


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()
