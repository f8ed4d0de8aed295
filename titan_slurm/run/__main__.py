"""What the batch script calls around the ranks: `begin RUN` prints the attempt's folder; `end RUN ATTEMPT EXIT_CODE`
gives its verdict, and leaves with the job's exit code. Not for people."""

import sys
from pathlib import Path

from titan_slurm.run import leave
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["begin", run]:
            print(leave.begin(RunDirectory(Path(run))).path)
        case ["end", run, folder, exit_code]:
            sys.exit(leave.end(RunDirectory(Path(run)), Attempt(Path(folder)), int(exit_code)))
        case _:
            sys.exit("usage: python -m titan_slurm.run begin RUN | end RUN ATTEMPT EXIT_CODE")
