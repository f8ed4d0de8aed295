"""What the batch script calls around the ranks: `begin RUN` prints the attempt's folder; `preflight ATTEMPT COMMAND`
looks at the nodes by COMMAND, which runs `look RUN ATTEMPT` on each; `end RUN ATTEMPT EXIT_CODE` gives its verdict, and
leaves with the job's exit code; `failed RUN WHAT` tells that no attempt could begin. Not for people."""

import sys
from pathlib import Path

from titan_slurm.run import leave, notify
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.look import look
from titan_slurm.run.preflight import preflight
from titan_slurm.run.verdict import BAD_NODES_EXIT_CODE

# The batch script ends here, and is not started again.
NO_ATTEMPT_EXIT_CODE = 88

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["begin", run]:
            try:
                print(leave.begin(RunDirectory(Path(run))).path)
            except leave.NoAttemptError as why:
                print(why, file=sys.stderr)
                sys.exit(NO_ATTEMPT_EXIT_CODE)
        case ["failed", run, what]:
            notify.tell_of_failed_set_up(RunDirectory(Path(run)), what)
        case ["preflight", folder, *command] if command:
            sys.exit(0 if preflight(Attempt(Path(folder)), command) else BAD_NODES_EXIT_CODE)
        case ["look", run, folder]:
            look(RunDirectory(Path(run)), Attempt(Path(folder)))
        case ["end", run, folder, exit_code]:
            sys.exit(leave.end(RunDirectory(Path(run)), Attempt(Path(folder)), int(exit_code)))
        case _:
            sys.exit(
                "usage: python -m titan_slurm.run begin RUN | preflight ATTEMPT COMMAND | look|end RUN ATTEMPT …"
                " | failed RUN WHAT"
            )
