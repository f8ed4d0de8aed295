"""Have running runs stop at a step, save, and start again, on other nodes perhaps. `scontrol requeue` alone leaves
them no more time for that than the site's KillWait.

Runs that nobody named, by --all or --name, are shown first, and you are asked; where there is no terminal, --yes has to
say that it is meant.

\b
Examples:
  titan-slurm requeue mine
  titan-slurm requeue --all --yes
"""

from titan_slurm.cli import options, select

NAME = "requeue"


def command(
    runs: select.Runs = None,
    everything: select.All = False,
    name: select.Glob = None,
    yes: select.Yes = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    from dataclasses import asdict

    from titan_slurm.cluster.requeue import requeue

    chosen = select.choose(NAME, ("running",), runs, everything, name, yes, runs_dir)
    select.report([asdict(each) for each in requeue(chosen)], "nothing to requeue", as_json)
