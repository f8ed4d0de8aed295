"""What stands in the place of srun on a single machine: submitit's controller, which also says how the ranks left."""

import os
import sys
import time
from pathlib import Path

from submitit.core.utils import JobPaths
from submitit.local.local import Controller

from titan_slurm.run.attempt import ATTEMPT_VARIABLE, Attempt

_TURN_S = 0.2
# As srun's --kill-on-bad-exit: the other ranks get as long to say what they saw.
_GRACE_S = 10.0


class LocalController(Controller):  # type: ignore[misc]
    """Starts the ranks, and ends them all when one fails."""

    def start_tasks(self) -> None:
        """Start one process per rank, each with its log in the attempt's folder."""
        attempt = Attempt(Path(os.environ[ATTEMPT_VARIABLE]))
        for rank in range(self.ntasks):
            log = JobPaths(self.folder, self.pid, rank).stdout
            # Every attempt has the same job id here, and a log of its own.
            log.unlink(missing_ok=True)
            log.symlink_to(attempt.log_file(rank))
        super().start_tasks()

    def wait(self, freq: int = 24) -> list[int | None]:  # noqa: ARG002 (submitit's signature)
        """Wait for all ranks. Returns their exit codes; None for one that had to be left to `kill_tasks`."""
        patience: float | None = None
        while True:
            codes = [task.poll() for task in self.tasks]
            if all(code is not None for code in codes):
                return codes
            if any(codes) and patience is None:
                patience = time.monotonic() + _GRACE_S
            if patience is not None and time.monotonic() > patience:
                return codes
            time.sleep(_TURN_S)


def main() -> int:
    """Run the ranks once. Returns 0, or the exit code of the first rank that failed, as a shell would report it."""
    controller = LocalController(Path(sys.argv[1]))
    try:
        controller.start_tasks()
        codes = controller.wait()
    finally:
        controller.kill_tasks()
    code = next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
