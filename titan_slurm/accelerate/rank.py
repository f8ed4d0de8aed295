"""The life of a rank that runs a user's script: as that of one which runs torchtitan's loop, with the script in its
place, in the environment that `accelerate launch` would give it."""

import os
import runpy
import sys
from pathlib import Path

from titan_slurm.accelerate import session
from titan_slurm.run.attempt import ATTEMPT_VARIABLE, Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.train import rank
from titan_slurm.train.stop import block_signals


def live(run_path: str) -> None:
    """Run the script of the run at `run_path` as the rank that the environment names. Leaves what
    `titan_slurm.train.rank.live` leaves, and ends the process as that does."""
    block_signals()
    _ScriptRank(RunDirectory(Path(run_path)), Attempt(Path(os.environ[ATTEMPT_VARIABLE]))).live()


class _ScriptRank(rank.Rank):
    def train(self, plan: Plan) -> None:
        """Run the script to its end."""
        watchdog = self.meet(plan, "titan_slurm.accelerate.accelerator")
        assert plan.script is not None
        ours = session.Session(self.run, self.attempt, plan, self.rank, self.stop, watchdog, self.events)
        session.begin(ours)
        self.training = ours
        os.environ.update(
            LOCAL_WORLD_SIZE=str(plan.layout.tasks_per_node),
            GROUP_RANK=str(self.rank // plan.layout.tasks_per_node),
            ACCELERATE_USE_CPU=str(plan.device == "cpu").lower(),
        )
        script = self.run.path / plan.script["path"]
        sys.argv = [str(script), *plan.script["arguments"]]
        # As Python does for a script: what lies beside it, where it was written, can be imported.
        sys.path.insert(0, plan.script["folder"])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as left:
            if left.code not in (None, 0):
                raise RuntimeError(f"the script left with {left.code!r}") from left
        if ours.finish is None:
            raise RuntimeError("the script has ended without making an Accelerator: nothing was trained")
        if not ours.stopped:
            ours.finish()

        import torch.distributed

        self.part(ours, watchdog)
        torch.distributed.destroy_process_group()
