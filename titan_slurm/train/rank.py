"""One rank's life, from the first line of its process to its last. What it trains lives in the modules beside this one.

Nothing heavy is imported before `live` runs: torch reads the environment when it is imported, and starts threads, so
environment and signal mask have to be right first.
"""

import multiprocessing
import os
import platform
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from titan_slurm.run import events
from titan_slurm.run.attempt import ATTEMPT_VARIABLE, Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.run.verdict import STOPPED_EXIT_CODE
from titan_slurm.train.stop import StopRequest, block_signals

if TYPE_CHECKING:
    from titan_slurm.train.trainer import Trainer

# What the launcher calls rank, local rank and number of ranks.
_LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
)


def live(run_path: str) -> None:
    """Train the run at `run_path` as the rank that the environment names, to its last step.

    Leaves `finished.json` or `stopped.json` (rank 0) or `error_rank_N.json` in the attempt's folder. Ends the process
    with STOPPED_EXIT_CODE where the ranks stopped because they were asked to; an error is raised again.
    """
    block_signals()
    _Rank(RunDirectory(Path(run_path)), Attempt(Path(os.environ[ATTEMPT_VARIABLE]))).live()


class _Rank:
    def __init__(self, run: RunDirectory, attempt: Attempt) -> None:
        self.run = run
        self.attempt = attempt
        self.trainer: Trainer | None = None
        self.rank, self.world_size = _enter_distributed_environment()
        self.events = attempt.events(events.RANK_0) if self.rank == 0 else events.NO_EVENTS
        self.events.add(events.RANK_STARTED)
        self.stop = StopRequest(attempt, self.rank, lambda: self.trainer.step if self.trainer else 0)

    def live(self) -> None:
        try:
            plan = self.run.plan()
            if self.world_size != plan.layout.world_size:
                raise RuntimeError(f"the plan is for {plan.layout.world_size} ranks, {self.world_size} were started")
            _set_environment(plan, self.run)
            _keep_compiled(plan, self.run)
            self._train(plan)
        except BaseException as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            step = self.trainer.last_step if self.trainer else None
            self.attempt.report_error(self.rank, line, traceback.format_exc(), step=step)
            raise
        finally:
            # Python would end them by SIGTERM, which they do not hear either, and then wait for them for ever.
            for child in multiprocessing.active_children():
                child.kill()
        if self.trainer and self.trainer.stopped:
            sys.exit(STOPPED_EXIT_CODE)

    def _train(self, plan: Plan) -> None:
        if plan.device == "cpu":
            from titan_slurm.train import cpu

            cpu.install()
        elif not _cuda_is_available():
            raise RuntimeError("the plan asks for GPUs, but torch finds none; a CPU run needs slurm.gpus_per_node = 0")

        import torch.distributed
        from torchtitan.tools.logging import init_logger

        from titan_slurm.train import data, provenance, rendezvous
        from titan_slurm.train.trainer import build_trainer
        from titan_slurm.train.watchdog import Watchdog

        init_logger()
        self.events.add(events.IMPORTS_DONE)
        store = rendezvous.meet(self.attempt, self.rank, self.world_size)
        self.events.add(events.RENDEZVOUS)
        provenance.check(self.run, self.attempt, plan, store, self.rank, self.world_size)
        rendezvous.once(store, "assets", self.rank, lambda: data.prepare_assets(self.run, plan))
        if self.rank == 0:
            provenance.check_assets(self.run, plan)
        self.events.add(events.DATA_READY)
        watchdog = Watchdog(self.attempt, self.rank, plan.requeue["hang_timeout"])
        self.trainer = trainer = build_trainer(plan, self.run, self.attempt)
        self.events.add(events.MODEL_BUILT)
        trainer.attend(self.attempt, self.stop, watchdog, self.events)
        try:
            trainer.train()
            if not trainer.stopped and trainer.step < plan.max_steps:
                raise RuntimeError(f"the data ran out after step {trainer.step} of {plan.max_steps}")
            if plan.export_to_hf and not trainer.stopped:
                with watchdog.patience():
                    trainer.export(self.run, plan)
            watchdog.close()
            torch.distributed.barrier()
            if self.rank == 0 and not trainer.stopped:
                self.attempt.finish(trainer.step)
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


def _keep_compiled(plan: Plan, run: RunDirectory) -> None:
    """Have torch keep what it compiles in the run, for the next attempt; a folder for each number of nodes and kind of
    GPU, since neither has use for what another compiled. Where the user has another place for it, that holds."""
    folder = run.cache_folder / f"{plan.layout.nodes}-nodes-{_kind_of_machine()}"
    # Before torch is imported, which sets the first one itself.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _kind_of_machine() -> str:
    """The name of this node's GPU, as the driver has it, or of its architecture where there is none."""
    about = [file.read_text() for file in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    models = {found[1] for text in about if (found := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))}
    return re.sub(r"[^A-Za-z0-9]+", "-", min(models)) if models else platform.machine()


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
