"""The two ends of an attempt, as the batch script calls them: `begin` before the ranks start, `end` when all have left,
which finds the verdict and has the scheduler start the run again if that is right."""

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from titan_slurm.run import events, job, nodes, notify, preflight, verdict
from titan_slurm.run.attempt import Attempt, host, new_attempt, user
from titan_slurm.run.checkpoints import newest_committed_step
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_json
from titan_slurm.run.verdict import STOPPED_EXIT_CODE, Budgets, Evidence, Next, Past, Verdict

# On a single machine the script itself starts again when `end` leaves with this code.
AGAIN_EXIT_CODE = STOPPED_EXIT_CODE

_NODE_ERRORS = ("CUDA error", "ECC", "Xid", "NVLink", "cudaError", "NCCL error", "ncclSystemError", "Bus error")
# Slurm's own requeue comes within the grace time; longer waiting would only hold the nodes.
_LONGEST_WAIT_S = 1800.0
# For a controller that is being started again.
_PATIENCE_S = 60.0
# From the answer of sbatch to the line in the list of jobs, of many runs.
_SUBMISSION_S = 20.0


class NoAttemptError(SystemExit):
    """The run is not to go on; with the reason."""


def begin(run: RunDirectory) -> Attempt:
    """Make the next attempt's folder. Called once by the batch script, before any rank starts, and again when Slurm
    starts the script again. Raises NoAttemptError, or SystemExit where that is no error."""
    wish = run.cancelled()
    if wish and wish["job_id"] in run.chain(_job_id()):
        # The wish and the decision to come back crossed each other.
        raise NoAttemptError(f"{wish['user']} has cancelled this run; `titan-slurm resume {run.name}` goes on with it")
    _be_known(run)
    settle(run)
    _leave_if_the_chain_has_ended(run)
    _check_budgets(run)
    attempt = new_attempt(run.attempts_folder)
    facts = {
        "started": time.time(),
        "job_id": _job_id(),
        "nodes": os.environ.get("SLURM_JOB_NODELIST") or host(),
        "restart_count": _restart_count(),
        "host": host(),
        "saved_step": _saved_step(run),
    }
    write_json(attempt.path / "attempt.json", facts)
    _note_failed_set_ups(run, attempt)
    known: dict[str, Any] = {name: facts[name] for name in ("job_id", "nodes", "restart_count")}
    attempt.events(events.BATCH_SCRIPT).add(events.STARTED, **known)
    return attempt


def _note_failed_set_ups(run: RunDirectory, attempt: Attempt) -> None:
    """The batch script has left out the nodes on which it could not set up what it has set up here."""
    for node, _ in run.setup_failures(_job_id()):
        nodes.blame(run, [node], attempt.number, verdict.NODE_FAILURE, job.spare_nodes(), is_sure=True)
    run.forget_setup_failures(_job_id())


def _be_known(run: RunDirectory) -> None:
    """Do what whoever submitted this job was killed before: list it among the run's, and give it the pickle that
    submitit's processes look for under the job's id, which is not known before there is a job."""
    job_id = _job_id()
    if run.plan().cluster != "slurm" or not job_id:
        return
    if run.submission_file.exists():
        # Whoever submits may be about to write it down, and holds the lock until that is done.
        with contextlib.suppress(OSError), run.lock(_SUBMISSION_S):
            pass
    if not any(job["job_id"] == job_id for job in run.jobs()):
        place = {"cluster": "slurm", "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME", "")}
        run.add_job({"job_id": job_id, "time": time.time(), "user": user()} | place)
    pickle = run.submitit_folder / f"{job_id}_submitted.pkl"
    for waiting in [] if pickle.exists() else run.submitit_folder.glob("*.pkl"):
        if not waiting.name.endswith(("_submitted.pkl", "_result.pkl")):
            # Whoever submits may be giving it that name at this moment.
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(waiting, pickle)


def settle(run: RunDirectory) -> None:
    """Give a verdict to each attempt whose batch script was ended before it could find one. For the next attempt,
    before it begins: no other can be running then."""
    for attempt in run.attempts():
        if attempt.verdict():
            continue
        facts = attempt.facts()
        job_id = facts.get("job_id", _job_id())
        slurm_state = job.past_state(job_id, facts.get("restart_count", 0)) if run.plan().cluster == "slurm" else ""
        found = verdict.judge_lost(attempt.finished(), attempt.stopped(), slurm_state)
        other = job_id != _job_id()
        if other and found.verdict == verdict.PREEMPTED and slurm_state not in verdict.BY_SLURM_STATE:
            found = Verdict(verdict.CRASHED, f"job {job_id} ended without a word")
        # If not, a user has submitted another job.
        came_back = job_id in run.chain(_job_id())
        again = came_back and found.verdict not in (verdict.COMPLETED, verdict.CANCELLED)
        _write_verdict(run, attempt, found, again=again, late=True)


def _leave_if_the_chain_has_ended(run: RunDirectory) -> None:
    """Leave if an earlier job of the chain has brought the run to its end."""
    chain = run.chain(_job_id())
    if len(chain) == 1:
        return
    if (newest := run.jobs()[-1]["job_id"]) not in chain:
        raise NoAttemptError(f"nothing to do: job {newest} was submitted for this run since")
    attempts = run.attempts()
    job_id = attempts[-1].facts().get("job_id") if attempts else None
    if job_id == _job_id() or job_id not in chain:
        return
    known = attempts[-1].verdict() or {}
    if known.get("again"):
        return
    text = f"nothing to do: job {job_id} of this chain has {known['verdict']}"
    if known["verdict"] != verdict.COMPLETED:
        raise NoAttemptError(f"{text}; {known.get('why') or known['reason']}")
    # Not an error: other jobs may wait for this one to end well.
    print(text, file=sys.stderr)
    raise SystemExit(0)


def _check_budgets(run: RunDirectory) -> None:
    """Leave if a budget is spent: Slurm brings a job back after a preemption or a node failure without asking."""
    attempts = run.attempts()
    past = _past(run, attempts)
    in_chain = len(run.chain(_job_id())) > 1
    then = verdict.after(past, _budgets(run, goes_on=in_chain)) if past else Next(again=True)
    if not then.again:
        attempts[-1].amend_verdict(again=False, why=then.why)
        notify.tell(run, attempts[-1])
        raise NoAttemptError(then.why)


def end(run: RunDirectory, attempt: Attempt, exit_code: int) -> int:
    """Find and write the verdict of an attempt whose ranks have all left; bring the run back if that is right.

    Returns the exit code with which the job is to end, if Slurm has not ended it by then.
    """
    code = _end(run, attempt, exit_code)
    notify.tell(run, attempt)
    return code


def _end(run: RunDirectory, attempt: Attempt, exit_code: int) -> int:
    facts = job.ask(_PATIENCE_S) if run.plan().cluster == "slurm" else None
    past = _past(run, [each for each in run.attempts() if each.number < attempt.number])
    evidence = dataclasses.replace(
        _evidence(run, attempt, exit_code, facts), has_advanced=any(each.advanced for each in past)
    )
    found = verdict.judge(evidence)
    follows = run.chain(_job_id())[-1] != _job_id()
    then = verdict.after([*past, _as_past(run, attempt, found)], _budgets(run, goes_on=follows))
    # Anything but RUNNING means that Slurm has decided already: another requeue would raise a cancelled job. Whether
    # the budgets allow what it decided is for the next attempt to see.
    decided = facts is not None and facts.state != "RUNNING" and found.verdict != verdict.COMPLETED
    if decided:
        then = Next(again=found.verdict == verdict.PREEMPTED or (follows and then.again))
    try:
        _blame(run, attempt, evidence, found)
        _give(run, attempt, found, then)
    except OSError as error:
        # On a full disk, say. The next attempt finds the verdict; that there is one is what counts now.
        print(f"the verdict, {found.verdict} ({found.reason}), cannot be written: {error}", file=sys.stderr)
    if decided:
        return exit_code or 1
    if not then.again:
        # On a single machine this code means that the run starts again.
        is_taken = run.plan().cluster == "local" and exit_code == AGAIN_EXIT_CODE
        return 0 if found.verdict == verdict.COMPLETED else 1 if is_taken else exit_code or 1
    if run.plan().cluster == "local":
        time.sleep(then.delay_s)
        return AGAIN_EXIT_CODE
    if follows and not run.plan().requeue["enabled"]:
        return exit_code or 1
    complaint = job.requeue(then.delay_s, nodes.to_exclude(run, run.plan()) if run.nodes_file.exists() else None)
    if complaint and not follows:
        _leave_to_slurm(attempt, found, complaint)
    return exit_code or 1


def _blame(run: RunDirectory, attempt: Attempt, evidence: Evidence, found: Verdict) -> None:
    if found.verdict in (verdict.CRASHED, verdict.HUNG) and (bad := _bad_nodes(attempt, evidence)):
        nodes.blame(run, bad, attempt.number, found.verdict, job.spare_nodes())
    if found.verdict == verdict.NODE_FAILURE and evidence.bad_nodes:
        nodes.blame(run, list(evidence.bad_nodes), attempt.number, found.verdict, job.spare_nodes(), is_sure=True)


def budgets(run: RunDirectory) -> Budgets:
    """The run's `[requeue]`."""
    settings = run.plan().requeue
    return Budgets(**{name: settings[name] for name in Budgets.__dataclass_fields__})


def _budgets(run: RunDirectory, *, goes_on: bool) -> Budgets:
    """The same, where the run goes on in another job whether or not this one may come back."""
    return dataclasses.replace(budgets(run), enabled=True) if goes_on else budgets(run)


def _give(run: RunDirectory, attempt: Attempt, found: Verdict, then: Next) -> None:
    _write_verdict(
        run,
        attempt,
        found,
        repeats=found.repeats,
        again=then.again,
        delay_s=then.delay_s,
        why=then.why,
    )


def _write_verdict(run: RunDirectory, attempt: Attempt, found: Verdict, **more: Any) -> None:
    more["saved_step"] = _saved_step(run)
    attempt.give_verdict(found.verdict, found.reason, **more)
    attempt.tell_verdict(events.BATCH_SCRIPT)


def _leave_to_slurm(attempt: Attempt, found: Verdict, complaint: str) -> None:
    """Where the job cannot requeue itself: stay until Slurm ends it, which then requeues a preempted job by itself."""
    advice = f"cannot requeue ({complaint}): `scontrol requeue {attempt.facts()['job_id']}` brings the run back"
    if found.verdict == verdict.PREEMPTED:
        attempt.amend_verdict(why=advice)
        time.sleep(_LONGEST_WAIT_S)
    # `stranded`: it was to come back, and nobody is there who could bring it.
    attempt.amend_verdict(again=False, stranded=True, why=advice)


def _evidence(run: RunDirectory, attempt: Attempt, exit_code: int, facts: job.JobFacts | None) -> Evidence:
    errors = attempt.errors()
    spoke = {int(error["rank"]) for error in errors}
    ranks = run.plan().layout.world_size
    # srun ends the others as soon as one has left with an error: silence then means nothing, unless nearly all spoke.
    silent = [rank for rank in range(ranks) if rank not in spoke] if spoke and len(spoke) * 2 >= ranks else []
    wish = run.cancelled()
    return Evidence(
        exit_code=exit_code,
        finished=attempt.finished(),
        stopped=attempt.stopped(),
        error=errors[0] if errors else None,
        silent_ranks=silent,
        cancel_wish=wish if wish and wish["job_id"] in run.chain(attempt.facts().get("job_id", "")) else None,
        requeue_wish=attempt.requeue_wish(),
        job=facts,
        restart_count=_restart_count(),
        bad_nodes=preflight.result(attempt).get("bad", {}),
    )


def _bad_nodes(attempt: Attempt, evidence: Evidence) -> list[str]:
    """The nodes of ranks that died without a word, or whose error is one of hardware, or of what the run found
    elsewhere: a file system that is not mounted, a GPU that somebody else uses."""
    hosts = attempt.hosts()
    suspects = {hosts[rank] for rank in evidence.silent_ranks if rank < len(hosts)}
    error = evidence.error
    at_the_start = evidence.has_advanced and error is not None and error["step"] is None
    if error and (at_the_start or any(sign in error["error"] for sign in _NODE_ERRORS)):
        suspects.add(error["host"])
    # Of a single node nothing can be excluded.
    return sorted(suspects) if len(set(hosts)) > 1 else []


def _past(run: RunDirectory, attempts: list[Attempt]) -> list[Past]:
    """What counts against the budgets. Whoever submitted another job, or brought back one that had ended, has looked at
    it: then all is counted anew."""
    past: list[Past] = []
    jobs = run.chain(_job_id())
    for attempt in attempts:
        if attempt.facts().get("job_id") not in jobs:
            continue
        known = attempt.verdict() or {"verdict": verdict.CRASHED, "again": True}
        advanced = known.get("saved_step", 0) > attempt.facts().get("saved_step", 0)
        past.append(Past(known["verdict"], advanced, known.get("repeats", False)))
        if not known.get("again"):
            past.clear()
    return past


def _as_past(run: RunDirectory, attempt: Attempt, found: Verdict) -> Past:
    advanced = _saved_step(run) > attempt.facts().get("saved_step", 0)
    return Past(found.verdict, advanced, found.repeats)


def _saved_step(run: RunDirectory) -> int:
    return newest_committed_step(Path(run.plan().torchtitan["checkpoint.folder"]))


def _job_id() -> str:
    return os.environ.get("TITAN_SLURM_LOCAL_JOB_ID") or job.own_id() or ""


def _restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
