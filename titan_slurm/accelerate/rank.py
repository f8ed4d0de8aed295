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


class WrongArgumentsError(Exception):
    """The script has left as one does that does not know its arguments."""


class EndedEarlyError(Exception):
    """The script had nothing left to do before the recipe's last step, and will have nothing at the next start."""


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
        # As Python does for a script: what lay beside it when it was submitted can be imported.
        sys.path.insert(0, str(script.parent) if plan.script.get("has_modules") else plan.script["folder"])
        # What is no Python there, a compiled module say, has no copy.
        sys.path.append(plan.script["folder"])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as left:
            if left.code == 2:
                raise WrongArgumentsError("the script left with 2; its log says which argument is wrong") from left
            if left.code not in (None, 0):
                raise RuntimeError(f"the script left with {left.code!r}") from left
        if ours.finish is None:
            raise RuntimeError("the script has ended without making an Accelerator: nothing was trained")
        if not ours.stopped:
            ours.finish()
        if not ours.stopped and ours.step < plan.max_steps:
            raise EndedEarlyError(
                f"the script ended after step {ours.step} of {plan.max_steps}, which is saved; let it pass over its "
                "data until accelerator.should_stop(), or be content: titan-slurm submit --resume --set "
                f"training.max_steps={ours.step}"
            )

        import torch.distributed

        self.part(ours, watchdog)
        torch.distributed.destroy_process_group()
