"""From a resolved recipe to a submitted job: plan, script, run directory, submission, in this order.

What only a submission needs is imported where it is needed: `validate` takes as long as its imports.
"""

import functools
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.cluster import slurm
from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.launch import create
from titan_slurm.launch.place import Place
from titan_slurm.launch.plan import make_plan
from titan_slurm.launch.script import refused, sbatch_options, template_for
from titan_slurm.recipe.find import Found
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run import events
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.run.task import RankTask


@dataclass(frozen=True)
class Prepared:
    """A run that could be submitted: nothing of it is on disk yet."""

    run: RunDirectory
    plan: Plan
    resolved: ResolvedRecipe
    template: Found
    resume: bool
    notes: list[str]
    """What a user should know of the plan before it runs."""

    @functools.cached_property
    def script(self) -> str:
        """The batch script. Raises BadInputError for a template that cannot be used."""
        from titan_slurm.launch.executors import executor

        return executor(self.plan, self.run).script()


def prepare(
    resolved: ResolvedRecipe,
    *,
    place: Place,
    runs: Path,
    name: str | None,
    resume: bool = False,
    only_show: bool = False,
) -> Prepared:
    """Plan a run. Writes nothing. Raises BadInputError with everything that is wrong; of a run
    that is only shown, what is missing on this machine becomes a note.
    """
    if resume and not name:
        raise bad_input("--resume", "say which run is to go on", "with --name")
    name = name or create.free_name(resolved.name, runs)
    create.check_name(name)
    run = RunDirectory(runs / name)
    missing: list[Problem] = []
    plan = make_plan(resolved, run, place.cluster, place.profile, elsewhere=missing if only_show else None)
    notes = [
        *_place_notes(place, plan),
        *_notes(resolved, place),
        *(f"not here, and submit would refuse it: {problem}" for problem in missing),
    ]
    if resume:
        from titan_slurm.launch import lock
        from titan_slurm.launch.resume import plan_to_go_on

        plan, more = plan_to_go_on(run, plan)
        notes += [*more, *lock.changes(run)]
    elif run.exists():
        hint = "choose another name, or go on with that run by --resume"
        raise bad_input("--name", f"there is a run {name} already: {run.path}", hint)
    prepared = Prepared(run, plan, resolved, template_for(plan), resume, notes)
    if place.profile is not None or prepared.template.origin != "built-in":
        # A template of a site's own, or for one, may be wrong; rendering it is how to know.
        assert prepared.script
    return prepared


def submit(prepared: Prepared) -> dict[str, Any]:
    """Make the run directory and submit its job. Returns the job's record.

    Raises BadInputError if the scheduler refuses; then a new run's directory is gone again.
    """
    run, script = prepared.run, prepared.script
    if prepared.resume:
        from titan_slurm.cluster.state import status
        from titan_slurm.launch.resume import check_resumable

        with run.lock():
            check_resumable(run, status(run), prepared.plan)
            run.keep_plan_in_history()
            create.write_contents(run, prepared.plan, prepared.resolved, script)
            run.cancel_file.unlink(missing_ok=True)
            return _submit_job(prepared.plan, run, resumed=True)
    create.create(run, prepared.plan, prepared.resolved, script)
    return submit_new(prepared.plan, run)


def submit_new(plan: Plan, run: RunDirectory) -> dict[str, Any]:
    """Submit the job of a run that was just made. Returns the job's record.

    Raises BadInputError if the scheduler refuses; then the run's directory is gone again.
    """
    try:
        with run.lock():
            return _submit_job(plan, run, resumed=False)
    except BadInputError:
        shutil.rmtree(run.path)
        raise


def would_start(prepared: Prepared) -> slurm.Answer | None:
    """What Slurm says of the job without taking it; None where there is no Slurm to ask."""
    if prepared.plan.cluster != "slurm" or not slurm.is_available():
        return None
    return slurm.test_only(prepared.script, sbatch_options(prepared.plan, prepared.run))


def _submit_job(plan: Plan, run: RunDirectory, *, resumed: bool) -> dict[str, Any]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from titan_slurm.launch.executors import executor

    submitter = executor(plan, run)
    # Before the job exists: once it does, its script is the one that writes.
    run.submissions().add(events.QUEUED, resumed=resumed)
    try:
        job = submitter.submit(RankTask(str(run.path)))
    except FileNotFoundError as error:
        run.submissions().add(events.REFUSED)
        raise bad_input("--cluster slurm", f"{error.filename} is not on the PATH of this machine") from None
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        run.submissions().add(events.REFUSED)
        raise BadInputError(Problem("sbatch refused the job", line) for line in lines) from None
    record = submitter.job_record(job) | {"time": time.time(), "user": _user()}
    run.add_job(record)
    return record


def _place_notes(place: Place, plan: Plan) -> list[str]:
    notes = [place.note] if place.note else []
    if place.profile is not None:
        notes.append(f"cluster {place.profile.name}: {place.profile.path}")
    for field, why in refused(plan).items():
        value = plan.values[field]
        notes.append(f"{field} = {value['value']!r} ({value['from']}) is not asked for: {why}")
    return notes


def _notes(resolved: ResolvedRecipe, place: Place) -> list[str]:
    recipe = resolved.recipe
    notes = [
        f"{'.'.join(key)} = {value.value!r} comes from the {value.origin}"
        for key, value in resolved.values.items()
        if value.origin.startswith("environment ") and not (place.cluster == "local" and key[0] == "slurm")
    ]
    built_in = [name for name in ("dataset", "tokenizer") if getattr(recipe.data, name) == "python_docs"]
    if built_in and not any((("data", name) in resolved.values) for name in built_in):
        notes.append("no data.dataset is given: training on the built-in text, 465 kB of Python's reference pages")
    return notes


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())
