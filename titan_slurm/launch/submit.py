"""From a resolved recipe to a submitted job: plan, script, run directory, submission, in this order."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError

from titan_slurm.cluster import slurm
from titan_slurm.cluster.state import status
from titan_slurm.errors import BadInputError, Problem, bad_input, did_you_mean
from titan_slurm.launch import create
from titan_slurm.launch.executors import executor
from titan_slurm.launch.plan import CLUSTERS, make_plan
from titan_slurm.launch.resume import check_resumable, plan_to_go_on
from titan_slurm.launch.script import template_for
from titan_slurm.recipe.find import Found
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.run.task import RankTask


@dataclass(frozen=True)
class Prepared:
    """A run that could be submitted: nothing of it is on disk yet."""

    run: RunDirectory
    plan: Plan
    resolved: ResolvedRecipe
    script: str
    template: Found
    resume: bool
    notes: list[str]
    """What a user should know of the plan before it runs."""


def choose_cluster(name: str | None) -> tuple[str, str]:
    """The cluster to use, and why where the user did not say. Raises BadInputError for an unknown one."""
    if name is None:
        if slurm.is_available():
            return "slurm", ""
        return "local", "no Slurm found here (no sbatch on the PATH): running on this machine"
    if name not in CLUSTERS:
        raise bad_input("--cluster", f"there is no cluster {name!r}", did_you_mean(name, CLUSTERS))
    return name, ""


def prepare(
    resolved: ResolvedRecipe,
    *,
    cluster: str,
    runs: Path,
    name: str | None,
    resume: bool = False,
    only_show: bool = False,
) -> Prepared:
    """Plan a run and render its script. Writes nothing. Raises BadInputError with everything that is wrong; of a run
    that is only shown, what is missing on this machine becomes a note.
    """
    if resume and not name:
        raise bad_input("--resume", "say which run is to go on", "with --name")
    name = name or create.free_name(resolved.name, runs)
    create.check_name(name)
    run = RunDirectory(runs / name)
    missing: list[Problem] = []
    plan = make_plan(resolved, run, cluster, elsewhere=missing if only_show else None)
    notes = [*_notes(resolved), *(f"not here, and submit would refuse it: {problem}" for problem in missing)]
    if resume:
        plan, more = plan_to_go_on(run, plan)
        notes += more
    elif run.exists():
        hint = "choose another name, or go on with that run by --resume"
        raise bad_input("--name", f"there is a run {name} already: {run.path}", hint)
    script = executor(plan, run).script()
    return Prepared(run, plan, resolved, script, template_for(cluster), resume, notes)


def submit(prepared: Prepared) -> dict[str, Any]:
    """Make the run directory and submit its job. Returns the job's record.

    Raises BadInputError if the scheduler refuses; then a new run's directory is gone again.
    """
    run = prepared.run
    if prepared.resume:
        with run.lock():
            check_resumable(run, status(run), prepared.plan)
            run.keep_plan_in_history()
            create.write_contents(run, prepared.plan, prepared.resolved, prepared.script)
            run.cancel_file.unlink(missing_ok=True)
            return _submit_job(prepared)
    create.create(run, prepared.plan, prepared.resolved, prepared.script)
    try:
        with run.lock():
            return _submit_job(prepared)
    except BadInputError:
        shutil.rmtree(run.path)
        raise


def _submit_job(prepared: Prepared) -> dict[str, Any]:
    run = prepared.run
    submitter = executor(prepared.plan, run)
    try:
        job = submitter.submit(RankTask(str(run.path)))
    except FileNotFoundError as error:
        raise bad_input("--cluster slurm", f"{error.filename} is not on the PATH of this machine") from None
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BadInputError(Problem("sbatch refused the job", line) for line in lines) from None
    record = submitter.job_record(job) | {"time": time.time(), "user": _user()}
    run.add_job(record)
    return record


def _notes(resolved: ResolvedRecipe) -> list[str]:
    recipe = resolved.recipe
    notes = [
        f"{'.'.join(key)} = {value.value!r} comes from the {value.origin}"
        for key, value in resolved.values.items()
        if value.origin.startswith("environment ")
    ]
    built_in = [name for name in ("dataset", "tokenizer") if getattr(recipe.data, name) == "python_docs"]
    if built_in and not any((("data", name) in resolved.values) for name in built_in):
        notes.append("no data.dataset is given: training on the built-in text, 465 kB of Python's reference pages")
    return notes


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())
