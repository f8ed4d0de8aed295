"""From a resolved recipe to a submitted job: plan, script, run directory, submission, in this order.

What only a submission needs is imported where it is needed: `validate` takes as long as its imports.
"""

import contextlib
import functools
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.cluster import slurm
from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.launch import create
from titan_slurm.launch.place import Place
from titan_slurm.launch.plan import make_plan
from titan_slurm.launch.script import refused, sbatch_options, template_for
from titan_slurm.launch.user_script import UserScript
from titan_slurm.launch.user_script import notes as script_notes
from titan_slurm.recipe.find import Found
from titan_slurm.recipe.mapping import warmup_steps
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.recipe.schema import Recipe
from titan_slurm.run import events
from titan_slurm.run.attempt import user
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
    dependency: str = ""
    """Other jobs to wait for, in sbatch's words. Not in the script, by which later jobs are submitted too: by then
    Slurm has forgotten these."""

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
    script: UserScript | None = None,
    quick: bool = False,
) -> Prepared:
    """Plan a run. Writes nothing. Raises BadInputError with everything that is wrong; of a run
    that is only shown, what is missing on this machine becomes a note. `quick`: large files are not read.
    """
    if resume and not name:
        raise bad_input("--resume", "say which run is to go on", "with --name")
    name = name or create.free_name(resolved.name, runs)
    create.check_name(name)
    run = RunDirectory(runs / name)
    missing: list[Problem] = []
    elsewhere = missing if only_show else None
    plan = make_plan(resolved, run, place.cluster, place.profile, elsewhere=elsewhere, script=script, quick=quick)
    notes = [
        *_place_notes(place, plan),
        *_notes(resolved, place),
        *(script_notes(plan) if script else _schedule_notes(resolved.recipe)),
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


def submit(prepared: Prepared, chain: int = 1) -> dict[str, Any]:
    """Make the run directory and submit its job, or a chain of several. Returns the record of the first.

    Raises BadInputError if the scheduler refuses; then a new run's directory is gone again.
    """
    run, script = prepared.run, prepared.script
    if prepared.resume:
        from titan_slurm.cluster import lost
        from titan_slurm.cluster.state import status
        from titan_slurm.launch.resume import check_resumable

        with run.lock() as held:
            if not lost.settle(run):
                raise NoAnswerError(f"run {run.name} may have a job", may_have_job=True)
            check_resumable(run, status(run), prepared.plan)
            return go_on(prepared, held, chain=chain)
    create.create(run, prepared.plan, prepared.resolved, script)
    return submit_new(prepared.plan, run, dependency=prepared.dependency, chain=chain)


def go_on(prepared: Prepared, held: int, **more: Any) -> dict[str, Any]:
    """Submit the next job of a run by its new plan, for whoever holds its lock. `more` is for `submit_job`. Returns the
    job's record. Raises BadInputError if the scheduler refuses."""
    run = prepared.run
    run.keep_plan_in_history()
    create.write_contents(run, prepared.plan, prepared.resolved, prepared.script)
    run.cancel_file.unlink(missing_ok=True)
    return submit_job(prepared.plan, run, held, resumed=True, dependency=prepared.dependency, **more)


def submit_new(plan: Plan, run: RunDirectory, **more: Any) -> dict[str, Any]:
    """Submit the job of a run that was just made. `more` is for `submit_job`. Returns the job's record.

    Raises BadInputError if the scheduler refuses; then the run's directory is gone again.
    """
    try:
        return submit_if_new(plan, run, **more) or run.jobs()[-1]
    except FileNotFoundError:
        raise bad_input("", f"run {run.name} was taken away while it was being submitted") from None


def submit_if_new(plan: Plan, run: RunDirectory, patience_s: float | None = None, **more: Any) -> dict[str, Any] | None:
    """The same for whoever may not be the only one who tries: None if the run has a job by now.

    Raises NoAnswerError if nobody can know, and what the run's `lock` raises.
    """
    from titan_slurm.cluster import lost

    refused = run.path.with_name(f".{run.name}.{secrets.token_hex(4)}")
    try:
        with run.lock(patience_s) as held:
            if not lost.settle(run):
                raise NoAnswerError(f"run {run.name} may have a job", may_have_job=True)
            if run.jobs():
                return None
            try:
                return submit_job(plan, run, held, resumed=False, **more)
            except BadInputError as error:
                if not (isinstance(error, NoAnswerError) and error.may_have_job):
                    # So that nobody who waits for the lock finds a run that is about to go. Some file systems cannot
                    # remove it while the lock is open.
                    run.path.rename(refused)
                raise
    finally:
        shutil.rmtree(refused, ignore_errors=True)


def would_start(prepared: Prepared) -> slurm.Answer | None:
    """What Slurm says of the job without taking it; None where there is no Slurm to ask."""
    if prepared.plan.cluster != "slurm" or not slurm.is_available():
        return None
    return slurm.test_only(prepared.script, sbatch_options(prepared.plan, prepared.run))


def submit_job(
    plan: Plan, run: RunDirectory, held: int, *, resumed: bool, dependency: str = "", chain: int = 1, **more: Any
) -> dict[str, Any]:
    """Submit a job by the script in the run, for whoever holds its lock (`held` is its descriptor), or a `chain` of so
    many; `dependency`: what it waits for, in sbatch's words. `more` goes into the job's record; the first one's is
    returned. Raises BadInputError if the scheduler refuses."""
    from titan_slurm.launch.executors import SlurmExecutor, executor

    submitter, task = executor(plan, run, held, dependency), RankTask(str(run.path))
    chain = chain if isinstance(submitter, SlurmExecutor) else 1
    begin_submission(run, resumed=resumed, **submitter.place(), **({"chain": chain} if chain > 1 else {}))
    with refusals([run]):
        jobs = submitter.submit_chain(task, chain) if chain > 1 else [submitter.submit(task)]
    if chain > 1:
        more["chain"] = [job.job_id for job in jobs]
    records = [submitter.job_record(job) | about_job() | more for job in jobs]
    for record in records:
        run.add_job(record)
    if chain > 1 and (complaint := slurm.release(jobs[0].job_id)):
        slurm.scancel(more["chain"])
        raise _no_job([run], complaint)
    run.end_submission()
    return records[0]


def about_job() -> dict[str, Any]:
    """What is written down of a job beside its id."""
    return {"time": time.time(), "user": user()}


def begin_submission(run: RunDirectory, *, resumed: bool, **more: Any) -> None:
    """Write down that a job is about to be submitted, for whoever holds the run's lock. `more`: where, and how it will
    be known again."""
    run.begin_submission(about_job() | {"user_id": str(os.getuid())} | more)
    # Before the job exists: once it does, its script is the one that writes.
    run.submissions().add(events.QUEUED, resumed=resumed)


@contextlib.contextmanager
def refusals(runs: Sequence[RunDirectory]) -> Iterator[None]:
    """Around the submission of the job of these runs: what went wrong is raised as BadInputError, and where it is sure
    that there is no job it is written down."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    except FileNotFoundError as error:
        raise _refused(
            runs, bad_input("--cluster slurm", f"{error.filename} is not on the PATH of this machine")
        ) from None
    except (FailedJobError, FailedSubmissionError) as error:
        raise _no_job(runs, str(error)) from None


class NoAnswerError(BadInputError):
    """Slurm's controller does not answer. `may_have_job`: sbatch has asked it, and did not hear what became of it; the
    run is then left as it is, and whoever looks at it next looks for the job."""

    def __init__(self, what: str, *, may_have_job: bool) -> None:
        hint = "nothing was submitted" if not may_have_job else "titan-slurm ensure submits if there is no job"
        super().__init__([Problem("", f"Slurm's controller does not answer: {what}", hint)])
        self.may_have_job = may_have_job


# What Slurm's commands say where they got no connection, and where one ended before the answer (slurm_errno.c).
_NO_CONNECTION = ("Unable to contact slurm controller (connect failure)", "Connection refused", "standby mode")
_NO_ANSWER = ("timed out", "Unable to contact slurm controller", "Zero Bytes", "Transport endpoint", "Connection reset")


def _no_job(runs: Sequence[RunDirectory], complaint: str) -> BadInputError:
    """What to raise where sbatch gave no job."""
    text = " ".join(complaint.split())
    if any(sign in complaint for sign in _NO_CONNECTION):
        return _refused(runs, NoAnswerError(text, may_have_job=False))
    if any(sign in complaint for sign in _NO_ANSWER):
        return NoAnswerError(text, may_have_job=True)
    lines = [line for line in complaint.splitlines() if line.strip()]
    return _refused(runs, BadInputError(Problem("sbatch refused the job", line) for line in lines))


def _refused(runs: Sequence[RunDirectory], error: BadInputError) -> BadInputError:
    """Write down that there is no job."""
    for run in runs:
        run.submissions().add(events.REFUSED)
        run.end_submission()
    return error


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


def _schedule_notes(recipe: Recipe) -> list[str]:
    warmup, total = warmup_steps(recipe), recipe.lr_schedule.total_steps or recipe.training.max_steps
    if warmup <= total:
        return []
    # An error would be in the way of a trial of some steps.
    what = f"a warm-up of {warmup:,} steps is longer than the schedule of {total:,}"
    return [f"{what}: torchtitan reaches the full learning rate at step {total:,}, and there is no decay"]
