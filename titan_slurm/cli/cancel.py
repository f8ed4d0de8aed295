"""End runs for good: their jobs are cancelled and do not come back. Their checkpoints stay.

Runs that nobody named, by --all or --name, are shown first, and you are asked; where there is no terminal, --yes has to
say that it is meant.

\b
Examples:
  titan-slurm cancel mine
  titan-slurm cancel 4711 4712
  titan-slurm cancel --name 'sweep-*' --yes
"""

from titan_slurm.cli import options, select

NAME = "cancel"


def command(
    runs: select.Runs = None,
    everything: select.All = False,
    name: select.Glob = None,
    yes: select.Yes = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    from dataclasses import asdict

    from titan_slurm.cluster.cancel import cancel
    from titan_slurm.cluster.state import ACTIVE

    chosen = select.choose(NAME, ACTIVE, runs, everything, name, yes, runs_dir)
    select.report([asdict(each) for each in cancel(chosen)], "nothing to cancel", as_json)
