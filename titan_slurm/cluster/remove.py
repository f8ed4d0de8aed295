"""Removing and archiving runs that are at rest: neither in the scheduler's hands nor being submitted."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.cluster.cancel import Outcome
from titan_slurm.cluster.state import NO_ANSWER, RunStatus, statuses
from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.run import remove as files
from titan_slurm.run.archive import ChangedError, write
from titan_slurm.run.checkpoints import Checkpoint
from titan_slurm.run.directory import RunDirectory


@dataclass(frozen=True)
class Seen:
    """A run with its status, and the jobs that it had then."""

    run: RunDirectory
    now: RunStatus
    jobs: list[dict[str, Any]]


def see(runs: Sequence[RunDirectory]) -> list[Seen]:
    """Look at runs, with one question to Slurm for all of them. Raises BadInputError for those not at rest."""
    jobs = [run.jobs() for run in runs]
    seen = [Seen(*each) for each in zip(runs, statuses(runs), jobs, strict=True)]
    problems = [problem for each in seen for problem in _why_not(each.run, each.now)]
    if problems:
        raise BadInputError(problems)
    return seen


def remove(seen: Seen, *, with_checkpoints: bool) -> Outcome:
    """Remove a run. Of its checkpoints, those outside its folder only if that is asked for, and if they are its own."""
    run, left = seen.run, ""
    doomed: list[Path] = []
    try:
        with _at_rest(seen):
            elsewhere = files.checkpoints_elsewhere(run)
            if elsewhere and with_checkpoints and (other := files.shared_with(run, elsewhere)):
                raise bad_input("", f"its checkpoints in {elsewhere} are also those of {other}", "leave them there")
            # The checkpoints last: as long as the run is there, so are they.
            doomed.append(files.take_away(run.path))
            if elsewhere and with_checkpoints:
                doomed.append(files.take_away(elsewhere))
            elif elsewhere:
                left = f"; its checkpoints stay in {elsewhere}"
        for path in doomed:
            files.delete(path)
        left += _remove_sweep_without_runs(run)
    except BadInputError as error:
        return Outcome(run.name, seen.now.job_id, changed=False, error=str(error))
    except OSError as error:
        what = f"cannot remove {error.filename or run.path}: {error.strerror}"
        return Outcome(run.name, seen.now.job_id, changed=bool(doomed), error=what)
    return Outcome(run.name, seen.now.job_id, changed=True, text=f"removed run {run.name} ({run.path}){left}")


def _remove_sweep_without_runs(run: RunDirectory) -> str:
    """Remove the folder of its sweep with the last of its runs. Returns what is to be said of that."""
    sweep = files.sweep_without_runs(run)
    if sweep is None:
        return ""
    # Another process may be removing the other runs.
    with contextlib.suppress(FileNotFoundError):
        files.delete(files.take_away(sweep))
    return f"; it was the last of its sweep, and {sweep} is gone too"


def archive(seen: Seen, target: Path, checkpoint: Checkpoint | None) -> Outcome:
    """Archive a run into a new file; see `titan_slurm.run.archive`."""
    run = seen.run
    try:
        with _at_rest(seen):
            sums = write(run, target, checkpoint)
    except FileExistsError:
        return Outcome(run.name, seen.now.job_id, changed=False, error=f"{target} exists already")
    except (BadInputError, ChangedError) as error:
        return Outcome(run.name, seen.now.job_id, changed=False, error=str(error))
    except OSError as error:
        what = f"cannot archive it: {error.filename or target}: {error.strerror or error}"
        return Outcome(run.name, seen.now.job_id, changed=False, error=what)
    size = f"{len(sums)} files, {target.stat().st_size / 2**20:.1f} MiB"
    what = f" with the checkpoint of step {checkpoint.step}" if checkpoint else " without checkpoints"
    text = f"archived run {run.name}{what} in {target} ({size})"
    return Outcome(run.name, seen.now.job_id, changed=True, text=text)


@contextlib.contextmanager
def _at_rest(seen: Seen) -> Iterator[None]:
    """Hold the run's lock; raises BadInputError if it is not as it was seen."""
    try:
        with seen.run.lock(patience_s=0):
            if seen.run.jobs() != seen.jobs or seen.run.submission():
                raise bad_input("", "has been submitted meanwhile")
            yield
    except BlockingIOError:
        raise bad_input("", "somebody is submitting it at this moment") from None


def _why_not(run: RunDirectory, now: RunStatus) -> list[Problem]:
    hint = f"titan-slurm cancel {run.name}"
    if now.reason == NO_ANSWER:
        return bad_input(run.name, f"may be running: {NO_ANSWER}").problems
    if now.is_active:
        return bad_input(run.name, f"is {now.state} as job {now.job_id}", hint).problems
    if run.submission():
        return bad_input(
            run.name, "may have a job: a submission was cut short", f"titan-slurm status {run.name}"
        ).problems
    return []
