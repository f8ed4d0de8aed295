"""Go on with runs that have ended before their last step, by the plan, the code and the script that they have.
`titan-slurm submit --resume` is for going on with something changed: more steps, say.

Runs that nobody named, by --all or --name (cancelled and failed ones), are shown first, and you are asked; where there
is no terminal, --yes has to say that it is meant.

\b
Examples:
  titan-slurm resume mine
  titan-slurm resume --name 'sweep-*'
"""

from typing import TYPE_CHECKING

from titan_slurm.cli import options, select

if TYPE_CHECKING:
    from titan_slurm.run.directory import RunDirectory

NAME = "resume"


def command(
    runs: select.Runs = None,
    everything: select.All = False,
    name: select.Glob = None,
    yes: select.Yes = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    chosen = select.choose(NAME, ("failed", "cancelled"), runs, everything, name, yes, runs_dir)
    select.report([_resume(run) for run in chosen], "nothing to resume", as_json)


def _resume(run: "RunDirectory") -> dict[str, object]:
    from titan_slurm.cli import show
    from titan_slurm.errors import BadInputError
    from titan_slurm.launch import lock
    from titan_slurm.launch.resume import resume

    outcome: dict[str, object] = {"name": run.name, "job_id": None, "changed": False, "text": "", "error": ""}
    try:
        job = resume(run)
    except BadInputError as error:
        return outcome | {"error": str(error)}
    for text in lock.changes(run):
        show.note(f"{run.name}: {text}")
    text = f"resumed run {run.name} as job {job['job_id']} on {job['cluster']}"
    return outcome | {"job_id": job["job_id"], "changed": True, "text": text}
