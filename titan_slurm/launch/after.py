"""A run that waits for others: which of their jobs, and what if there is nothing to wait for any more."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from titan_slurm.cluster.state import RunStatus, statuses
from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.launch.submit import Prepared
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.find import find_run

# What of sbatch's --dependency each option means.
KINDS = {"--after": "afterok", "--after-any": "afterany"}


@dataclasses.dataclass(frozen=True)
class Wait:
    """What a new job is to wait for: sbatch's words for it, empty if nothing is left, and what the user should know."""

    dependency: str
    notes: list[str]


def wait_for(named: dict[str, Sequence[str]], runs: Path) -> Wait:
    """What to wait for: `named` has the runs' names, paths or job ids by option, `--after` (they must complete) or
    `--after-any` (they must end). Raises BadInputError with everything that cannot be waited for."""
    problems: list[Problem] = []
    found: list[tuple[str, RunDirectory]] = []
    for option, names in named.items():
        for name in names:
            try:
                found.append((option, find_run(name, runs)))
            except BadInputError as error:
                problems += [dataclasses.replace(each, where=f"{option} {name}") for each in error.problems]
    parts: dict[str, list[str]] = {}
    notes = []
    for (option, run), now in zip(found, statuses([run for _, run in found]), strict=True):
        where = f"{option} {run.name}"
        if problem := _problem(where, now):
            problems.append(problem)
        elif not now.is_active:
            notes.append(f"{where}: it has ended ({now.state}), nothing is left to wait for")
        else:
            # Of a chain the last one, which is there to the end.
            parts.setdefault(KINDS[option], []).append(run.chain(now.job_id or "")[-1])
    if problems:
        raise BadInputError(problems)
    return Wait(",".join(":".join([kind, *job_ids]) for kind, job_ids in parts.items()), notes)


def _problem(where: str, now: RunStatus) -> Problem | None:
    if now.state == "created":
        return Problem(where, "it was never submitted", "submit it first")
    if now.is_active and now.cluster != "slurm":
        return Problem(where, "it runs on this machine, and Slurm cannot wait for it", "wait until it has ended")
    if now.state in ("failed", "cancelled") and where.startswith("--after "):
        return Problem(where, f"it is {now.state}, and will not complete", "go on with it first, or use --after-any")
    return None


def depending(prepared: Prepared, wait: Wait) -> Prepared:
    """The same run, waiting. Raises BadInputError where it is not Slurm that starts it."""
    if not wait.dependency:
        return dataclasses.replace(prepared, notes=[*prepared.notes, *wait.notes])
    plan = prepared.plan
    if plan.cluster != "slurm":
        raise bad_input("--after", "only a job of Slurm's can wait for another", "leave --cluster local out")
    own = plan.slurm["sbatch"].get("dependency")
    if own and "?" in own:
        what = f"slurm.sbatch.dependency = {own!r} waits for any of its jobs, and --after for all"
        raise bad_input("--after", what, "leave one of them out")
    whole = ",".join(part for part in (own, wait.dependency) if part)
    note = f"waits for other jobs: sbatch --dependency={whole}"
    return dataclasses.replace(prepared, dependency=whole, notes=[*prepared.notes, *wait.notes, note])
