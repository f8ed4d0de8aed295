"""Jobs that the scheduler has and their runs do not know: whoever submitted them was killed, or was not told, before
their ids could be written down. They are looked for only where a submission was begun and not ended."""

import contextlib
from collections.abc import Iterable
from typing import Any

from titan_slurm.cluster import local, slurm
from titan_slurm.cluster.elsewhere import elsewhere
from titan_slurm.errors import bad_input
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.find import unreadable
from titan_slurm.run.plan import Plan

# Between the clocks of the machine that submitted and of Slurm's controller.
_SKEW_S = 60.0

Jobs = list[dict[str, Any]]


def settle(run: RunDirectory) -> bool:
    """Write down the job of a submission that was cut short, if it has one, for whoever holds the run's lock. False if
    Slurm cannot be asked, so that nobody can know. Raises BadInputError if it can only be asked elsewhere."""
    about = run.submission()
    if about and (there := elsewhere(about)):
        raise bad_input("", f"run {run.name} may have a job of {there}: a submission was cut short", "look from there")
    found = _find([run])
    if found is None:
        return False
    for _, jobs in found:
        _record(run, jobs)
    return True


def look(runs: Iterable[RunDirectory]) -> None:
    """The same for runs that nobody holds, with one question to Slurm for all of them. That there is no job is not
    concluded here: sbatch may still be at work."""
    open_ones = [run for run in runs if run.submission_file.exists() and not unreadable(run)]
    open_ones = [run for run in open_ones if (about := run.submission()) and not elsewhere(about)]
    for run, jobs in _find(open_ones) or []:
        # Whoever holds it does the same; and one may look at a run that is somebody else's.
        with contextlib.suppress(BlockingIOError, FileNotFoundError, PermissionError), run.lock(patience_s=0):
            about = run.submission()
            if about and (_chain(run, about, jobs) if "chain" in about else jobs):
                _record(run, jobs)


def _record(run: RunDirectory, jobs: Jobs) -> None:
    about, known = run.submission() or {}, {job["job_id"] for job in run.jobs()}
    chain = _chain(run, about, jobs) if "chain" in about else []
    if "chain" in about and not chain:
        # Its first job is held, so that none of those there are has begun.
        slurm.scancel([job["job_id"] for job in jobs])
        jobs = []
    for job in jobs:
        if job["job_id"] not in known:
            run.add_job(job | ({"chain": chain} if chain else {}))
    if chain:
        slurm.release(chain[0])
    run.end_submission()


def _chain(run: RunDirectory, about: dict[str, Any], jobs: Jobs) -> list[str]:
    """The ids of a chain's jobs, first to last, of which `jobs` are not written down yet; none if it is not whole."""
    written = [job["chain"] for job in run.jobs() if "chain" in job and job["time"] >= about["time"]]
    found = written[-1] if written else [job["job_id"] for job in jobs]
    return list(found) if len(found) == about["chain"] else []


def _find(runs: list[RunDirectory]) -> list[tuple[RunDirectory, Jobs]] | None:
    """The jobs that runs do not know, of each with an open submission; None when Slurm's controller does not answer."""
    begun = [(run, run.plan(), about) for run in runs if (about := run.submission())]
    in_slurm = [(plan, about) for _, plan, about in begun if plan.cluster == "slurm"]
    known: list[slurm.Submitted] = []
    if in_slurm:
        since = min(float(about["time"]) for _, about in in_slurm) - _SKEW_S
        names = (_called(plan, about)[0] for plan, about in in_slurm)
        answer = slurm.submitted((about["user_id"] for _, about in in_slurm), names, since)
        if answer is None:
            return None
        known = answer
    return [
        (run, _of_this_machine(run, about) if plan.cluster == "local" else _of_slurm(run, plan, about, known))
        for run, plan, about in begun
    ]


def _of_slurm(run: RunDirectory, plan: Plan, about: dict[str, Any], known: list[slurm.Submitted]) -> Jobs:
    # A job that has begun to run is in this list by its own doing, however long Slurm has forgotten it.
    recorded = {job["job_id"] for job in run.jobs()}
    new = {job.job_id for job in known if _is_of(job, plan, about)} - recorded
    return [{"job_id": job_id} | _record_of(about) for job_id in sorted(new, key=_order)]


def _is_of(job: slurm.Submitted, plan: Plan, about: dict[str, Any]) -> bool:
    name, comment, task = _called(plan, about)
    if job.job_id.partition("_")[2] != task:
        return False
    if job.comment:
        return job.comment == comment
    # Accounting keeps no comments unless it is told to, and some sites refuse them.
    return job.name == name and abs(job.time - float(about["time"])) < _SKEW_S


def _called(plan: Plan, about: dict[str, Any]) -> tuple[str, str, str]:
    """Name, comment and number in its array of a submission's job. All of an array have the same name and comment."""
    array = about.get("array")
    return (array["name"], array["comment"], str(array["task"])) if array else (plan.name, plan.job_comment, "")


def _of_this_machine(run: RunDirectory, about: dict[str, Any]) -> Jobs:
    found = local.find(run.script_file)
    if found is None:
        return []
    process_id, started = found
    known = any(job["job_id"] == str(process_id) and job["process_started"] == started for job in run.jobs())
    return [] if known else [{"job_id": str(process_id), "process_started": started} | _record_of(about)]


def _record_of(about: dict[str, Any]) -> dict[str, Any]:
    """What a submission and its job have in common."""
    return {name: about[name] for name in ("time", "user", "cluster", "slurm_cluster", "host") if name in about}


def _order(job_id: str) -> tuple[int, str]:
    digits = "".join(character if character.isdigit() else " " for character in job_id).split()
    return (int(digits[0]) if digits else 0, job_id)
