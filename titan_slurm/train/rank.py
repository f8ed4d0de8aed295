"""One rank's life, from the first line of its process to its last. What it trains lives in the modules beside this one.

Nothing heavy is imported before `live` runs: torch reads the environment when it is imported, and starts threads, so
environment and signal mask have to be right first.
"""

import atexit
import gc
import importlib
import multiprocessing
import os
import platform
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from titan_slurm.run import events
from titan_slurm.run.attempt import ATTEMPT_VARIABLE, Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.run.verdict import STOPPED_EXIT_CODE
from titan_slurm.train import wandb_courier
from titan_slurm.train.stop import StopRequest, block_signals
from titan_slurm.train.wandb_courier import Courier

if TYPE_CHECKING:
    from titan_slurm.train.watchdog import Watchdog

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
    Rank(RunDirectory(Path(run_path)), Attempt(Path(os.environ[ATTEMPT_VARIABLE]))).live()


class Training(Protocol):
    """What a rank knows of what it trains."""

    step: int
    """Of the run, so far."""
    last_step: int | None
    """The last one that ended in this attempt."""
    stopped: bool
    """The ranks leave because they were asked to."""


class Rank:
    """A rank that trains by torchtitan's loop; another kind has its own `train`."""

    def __init__(self, run: RunDirectory, attempt: Attempt) -> None:
        self.run = run
        self.attempt = attempt
        self.training: Training | None = None
        self.courier: Courier | None = None
        self.exit_code: int | None = None
        """Known when all that this rank had to do is done."""
        self.rank, self.world_size = enter_distributed_environment()
        self.events = attempt.events(events.RANK_0) if self.rank == 0 else events.NO_EVENTS
        self.events.add(events.RANK_STARTED)
        self.stop = StopRequest(attempt, self.rank, lambda: self.training.step if self.training else 0)

    def live(self) -> None:
        """From here to the end of the process."""
        # Registered before the others, and so called after them.
        atexit.register(self._leave)
        try:
            plan = self.run.plan()
            if self.world_size != plan.layout.world_size:
                raise RuntimeError(f"the plan is for {plan.layout.world_size} ranks, {self.world_size} were started")
            _set_environment(plan)
            # Beside the imports: it takes longer to start than it has time for later.
            mode = wandb_courier.mode(plan)
            if self.rank == plan.metrics_rank and mode != wandb_courier.DISABLED:
                self.courier = Courier(self.run, self.attempt, mode)
            _keep_compiled(plan, self.run)
            self.train(plan)
        except BaseException as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            step = self.training.last_step if self.training else None
            self.attempt.report_error(self.rank, line, traceback.format_exc(), step=step)
            raise
        finally:
            # Python would end them by SIGTERM, which they do not hear either, and then wait for them for ever.
            for child in multiprocessing.active_children():
                child.kill()
        self.exit_code = STOPPED_EXIT_CODE if self.training and self.training.stopped else 0
        if self.exit_code:
            sys.exit(self.exit_code)

    def _leave(self) -> None:
        """Leave without taking apart what torch has imported and allocated: that takes long, and the kernel does it."""
        if self.exit_code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code)

    def train(self, plan: Plan) -> None:
        """All that the plan asks for."""
        watchdog = self.meet(plan, "titan_slurm.train.trainer")

        import torch.distributed

        from titan_slurm.train.trainer import build_trainer

        self.training = trainer = build_trainer(plan, self.run, self.attempt)
        self.events.add(events.MODEL_BUILT)
        trainer.attend(self.attempt, self.stop, watchdog, self.events)
        try:
            trainer.train()
            if not trainer.stopped and trainer.step < plan.max_steps:
                raise RuntimeError(f"the data ran out after step {trainer.step} of {plan.max_steps}")
            if plan.export_to_hf and not trainer.stopped:
                with watchdog.patience():
                    trainer.export(self.run, plan)
            self.part(trainer, watchdog)
        finally:
            trainer.close()
        torch.distributed.destroy_process_group()

    def meet(self, plan: Plan, trains: str) -> "Watchdog":
        """Import the module that `trains`, find the other ranks, and have the run's data ready. Returns the watchdog,
        at work."""
        # What is imported stays; to look through it for garbage again and again takes a quarter of the time.
        gc.disable()
        if plan.device == "cpu":
            from titan_slurm.train import cpu

            cpu.install()
        elif not _cuda_is_available():
            raise RuntimeError("the plan asks for GPUs, but torch finds none; a CPU run needs slurm.gpus_per_node = 0")

        from torchtitan.tools.logging import init_logger

        from titan_slurm.train import data, provenance, rendezvous
        from titan_slurm.train.watchdog import Watchdog

        importlib.import_module(trains)
        gc.freeze()
        gc.enable()
        init_logger()
        self.events.add(events.IMPORTS_DONE)
        store = rendezvous.meet(self.attempt, self.rank, self.world_size)
        self.events.add(events.RENDEZVOUS)
        provenance.check(self.run, self.attempt, plan, store, self.rank, self.world_size)
        rendezvous.once(store, "assets", self.rank, lambda: data.prepare_assets(self.run, plan))
        if self.rank == 0:
            provenance.check_assets(self.run, plan)
        self.events.add(events.DATA_READY)
        return Watchdog(self.attempt, self.rank, plan.requeue["hang_timeout"])

    def part(self, training: Training, watchdog: "Watchdog") -> None:
        """All is trained, or saved before leaving: tell wandb and the others. Collective."""
        import torch.distributed

        watchdog.close()
        # While the others wait: srun ends a rank that is still here when another one has left.
        if self.courier:
            left = self.stop.seconds_left() if training.stopped else None
            self.courier.finish(stopped=training.stopped, seconds_left=left)
        torch.distributed.barrier()
        if self.rank == 0 and not training.stopped:
            self.attempt.finish(training.step)


def enter_distributed_environment() -> tuple[int, int]:
    """Set RANK, LOCAL_RANK and WORLD_SIZE as torch expects them. Returns rank and world size."""
    for names in _LAUNCHERS:
        if all(name in os.environ for name in names):
            rank, local_rank, world_size = (int(os.environ[name]) for name in names)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
            return rank, world_size
    raise RuntimeError("neither Slurm nor the local launcher says which rank this is")


def _set_environment(plan: Plan) -> None:
    os.environ.update(
        # Only the rank that logs the loss needs torchtitan's own warning about it; every rank has a log file here.
        LOG_RANK=",".join(map(str, range(plan.layout.world_size))),
        # The data comes from local files or is streamed; whoever wants the hub's tokenizer names a folder.
        TOKENIZERS_PARALLELISM="false",
    )


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


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()
