"""What the batch script calls around the ranks: `begin RUN` prints the attempt's folder, `end ATTEMPT EXIT_CODE`
gives its verdict and prints it. Not for people."""

import sys
from pathlib import Path

from titan_slurm.run import attempt

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["begin", run]:
            print(attempt.begin(Path(run)).path)
        case ["end", folder, exit_code]:
            print(attempt.end(attempt.Attempt(Path(folder)), int(exit_code)))
        case _:
            sys.exit("usage: python -m titan_slurm.run begin RUN | end ATTEMPT EXIT_CODE")
