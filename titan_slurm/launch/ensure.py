"""Making sure of a run, where nobody looks on: it is queued, running or finished, or it is submitted. Whoever ended it,
and whatever budget is spent, is not fought; and where nobody can know whether it has a job, nothing is done."""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titan_slurm.cluster import lost, slurm
from titan_slurm.cluster.elsewhere import elsewhere
from titan_slurm.cluster.state import ALIVE_IN_SLURM, NO_ANSWER, RunStatus, status
from titan_slurm.errors import BadInputError, bad_input
from titan_slurm.launch import create
from titan_slurm.launch.submit import NoAnswerError, Prepared, go_on, submit_if_new, submit_job
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run import verdict as verdicts
from titan_slurm.run.checkpoints import newest_committed_step
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import locked
from titan_slurm.run.plan import Plan

# Exit codes. 2 is an error, as everywhere; 75 is EX_TEMPFAIL of sysexits.h.
FINE, CANCELLED, FAILED, UNKNOWN = 0, 3, 4, 75

# In all, for a controller that is being started again, and for another process that is at work on the run.
_PATIENCE_S = 30.0
_TURN_S = 3.0
# What Slurm or the site did to a run, and not the run itself.
_NOT_ITS_OWN = (verdicts.PREEMPTED, verdicts.TIME_LIMIT, verdicts.NODE_FAILURE)


@dataclass(frozen=True)
class Outcome:
    """What was found or done, in a line, and the exit code that says it to programs."""

    code: int
    text: str


def ensure(
    run: RunDirectory, new: Callable[[], Prepared] | None, update: Callable[[], Prepared] | None = None
) -> Outcome:
    """Make sure of the run. `new` plans it where there is none yet; `update` plans how it goes on if that is not by the
    plan that it has. Raises BadInputError if it cannot be planned, or if the scheduler refuses it."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        patience_s = max(0.0, give_up - time.monotonic())
        try:
            outcome = _once(run, new, update, patience_s)
            waiting_for = "Slurm's controller does not answer"
        except BlockingIOError:
            outcome, waiting_for = None, "another process is submitting it"
        except FileNotFoundError as error:
            if run.exists() or new is None:
                raise bad_input(str(error.filename or run.path), "is not there any more") from None
            # Another process was refused and took the run away. Now it is for this one to try.
            outcome, waiting_for = None, "another process was refused, and took it away"
        except OSError as error:
            raise bad_input(str(run.path), error.strerror or type(error).__name__) from None
        except NoAnswerError as error:
            outcome, waiting_for = None, error.problems[0].what
        if outcome is not None:
            return outcome
        if time.monotonic() + _TURN_S >= give_up:
            return Outcome(UNKNOWN, f"run {run.name}: {waiting_for}; nothing is changed")
        time.sleep(_TURN_S)


def changes(plan: Plan, resolved: ResolvedRecipe) -> list[str]:
    """The fields of which a recipe now says something else than the plan that a run has."""
    before = {
        name: value["value"] for name, value in plan.values.items() if not name.startswith(("cluster.", "recipe."))
    }
    after = {".".join(key): value.value for key, value in resolved.values.items() if key[0] != "recipe"}
    names = sorted(before.keys() | after.keys())
    # The plan has been through JSON.
    return [name for name in names if _text(before.get(name)) != _text(after.get(name))]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _once(
    run: RunDirectory, new: Callable[[], Prepared] | None, update: Callable[[], Prepared] | None, patience_s: float
) -> Outcome | None:
    """What was found or done; None if that cannot be known now."""
    if not run.exists():
        assert new is not None
        try:
            if not _make(run, new, patience_s):
                return None
        except BadInputError:
            # Somebody else may have made it meanwhile.
            if not run.exists():
                raise
    if not run.jobs():
        job = submit_if_new(run.plan(), run, patience_s)
        if job is not None:
            return Outcome(FINE, f"submitted run {run.name} as job {job['job_id']}")
    with run.lock(patience_s) as held:
        return _make_sure(run, held, update) if lost.settle(run) else None


def _make(run: RunDirectory, new: Callable[[], Prepared], patience_s: float) -> bool:
    """Make the run's directory. False if there is no scheduler now that could be asked to run it."""
    prepared = new()
    if prepared.plan.cluster == "slurm" and not slurm.is_answering():
        return False
    folder = run.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_input(str(folder), f"cannot be made: {error.strerror}") from None
    # Of many that make it at once one does in any case; this spares the others the work.
    with locked(folder / ".lock", patience_s):
        if not run.exists():
            create.create(run, prepared.plan, prepared.resolved, prepared.script)
    return True


def _make_sure(run: RunDirectory, held: int, update: Callable[[], Prepared] | None) -> Outcome | None:
    """The same for a run that has had a job."""
    now = status(run)
    if now.is_active and (there := elsewhere(run.jobs()[-1])):
        return Outcome(UNKNOWN, f"run {run.name} has a job of {there}, and nobody can know here whether it lives")
    if now.is_active:
        where = f"as job {now.job_id}, at step {now.step} of {now.max_steps}"
        return None if now.reason == NO_ANSWER else Outcome(FINE, f"run {run.name} is {now.state} {where}")
    if now.state == "cancelled":
        return Outcome(CANCELLED, f"run {run.name} was cancelled ({now.reason}); {_by_hand(run)}")
    more = update() if update else None
    if now.state == "completed" and not (more and more.plan.max_steps > now.max_steps):
        return Outcome(FINE, f"run {run.name} is finished: {now.reason or f'{now.step} steps done'}")
    if now.state == "failed" and (why := _why_not(run, now)):
        return Outcome(FAILED, f"run {run.name} has failed for good ({why}); {_by_hand(run)}")
    alive = _still_in_slurm(run)
    if alive is None:
        return None
    if alive:
        return Outcome(FINE, f"run {run.name} is {now.state}, and Slurm still has {', '.join(alive)} of it")
    return _resubmit(run, held, now, more)


def _by_hand(run: RunDirectory) -> str:
    # By its path: what cron mails is read in another folder.
    return f"`titan-slurm resume {shlex.quote(str(run.path))}` goes on with it"


def _resubmit(run: RunDirectory, held: int, now: RunStatus, more: Prepared | None) -> Outcome:
    saved = newest_committed_step(run.checkpoints_folder)
    mark: dict[str, Any] = {"ensured": True, "saved_step": saved}
    job = go_on(more, held, **mark) if more else submit_job(run.plan(), run, held, resumed=True, **mark)
    ended = f"job {now.job_id} ended as {now.verdict}" + (f": {now.reason}" if now.reason else "")
    return Outcome(FINE, f"submitted run {run.name} again as job {job['job_id']}, from step {saved} ({ended})")


def _why_not(run: RunDirectory, now: RunStatus) -> str:
    """Why a run that has failed is not submitted again; empty if it is: nobody has decided that it should end."""
    attempts = run.attempts()
    of_last_job = attempts and attempts[-1].facts().get("job_id") in run.chain(run.jobs()[-1]["job_id"])
    verdict = (attempts[-1].verdict() if of_last_job else None) or {}
    if verdict.get("again") is False and not verdict.get("stranded"):
        if not run.plan().requeue["enabled"]:
            # That a job must not requeue itself is why there is somebody to submit another. Not so for errors.
            if verdict["verdict"] not in _NOT_ITS_OWN:
                return now.reason
        elif verdict.get("why"):
            return now.reason
    allowed = run.plan().requeue["stalled"]
    if (count := _in_vain(run)) >= allowed:
        return f"submitted again {count} times in a row without a new checkpoint ([requeue] stalled = {allowed})"
    return ""


def _in_vain(run: RunDirectory) -> int:
    """How often in a row it was submitted again from the checkpoint that is still its newest."""
    saved, count = newest_committed_step(run.checkpoints_folder), 0
    for job in reversed(run.jobs()):
        if not job.get("ensured") or job["saved_step"] != saved:
            break
        count += 1
    return count


def _still_in_slurm(run: RunDirectory) -> list[str] | None:
    """What Slurm still has of the run's jobs, whatever its directory says: one that is just ending, or that somebody
    had Slurm start again. None if Slurm does not answer."""
    if run.plan().cluster == "local":
        return []
    ids = [job_id for job in run.jobs() if not elsewhere(job) for job_id in job.get("chain", [job["job_id"]])]
    known = slurm.jobs(ids)
    if known is None:
        return None
    return [f"job {each.job_id} ({each.state})" for each in known.values() if each.state in ALIVE_IN_SLURM]
