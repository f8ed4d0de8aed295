"""What the ranks of a training agree on about a folder of checkpoints: what to go on from, and whether a step is saved.
`titan_slurm.run.checkpoints` says what a commit is."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from titan_slurm.run import checkpoints
from titan_slurm.run.checkpoints import NoUsableCheckpointError
from titan_slurm.train.agreement import agreement
from titan_slurm.train.stop import StopRequest

T = TypeVar("T")

# A save takes as long as the ones before it, or a little longer.
_SAVE_MARGIN = 1.5

# The same as torchtitan's.
_logger = logging.getLogger()


def choose(folder: Path) -> int:
    """As `newest_good`, of the training's own folder: what does not verify or was never committed is set aside.
    Collective. Raises NoUsableCheckpointError."""
    chosen, bad = _newest_good(folder)
    if is_rank_0():
        for step, problems in bad.items():
            _set_aside(checkpoints.step_folder(folder, step), checkpoints.BAD, problems)
        for each in checkpoints.list_checkpoints(folder):
            if each.state == checkpoints.UNCOMMITTED:
                _set_aside(each.path, checkpoints.PARTIAL, ["a save that was never committed"])
        if chosen != -1:
            _logger.info(f"The checkpoint of step {chosen} verifies; going on from it.")
    # Nobody saves or loads while rank 0 renames.
    return agreement().from_rank_0(chosen)


def newest_good(folder: Path) -> int:
    """The newest committed step that verifies; -1 where there never was a checkpoint. Changes nothing. Collective.
    Raises NoUsableCheckpointError."""
    return _newest_good(folder)[0]


def check_start(path: Path) -> None:
    """Verify another run's checkpoint, if it is one of ours. Collective. Raises NoUsableCheckpointError."""
    is_ours = from_rank_0(lambda: (path / checkpoints.COMMIT_FILE).exists())
    if is_ours and (problems := verify(path)):
        raise NoUsableCheckpointError(f"{path} cannot be started from: {'; '.join(problems)}")


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint. Each rank reads its part of the files, and all know the answer. Collective."""
    record = from_rank_0(lambda: checkpoints.read_commit_or_problem(path))
    if isinstance(record, str):
        return [record]
    by_size = sorted(record.files, key=lambda name: (record.files[name].size, name))
    problems = checkpoints.problems_with(path, record, by_size[dist.get_rank() :: dist.get_world_size()])
    return sorted(line for lines in agreement().gather(problems) for line in lines)


def is_saved(folder: Path, step: int) -> bool:
    """Whether a step is committed; what else may be in its folder's place is moved out of the way. Collective."""
    return from_rank_0(lambda: _is_saved(checkpoints.step_folder(folder, step)))


def why_not_save(folder: Path, stop: StopRequest) -> str:
    """Why a save into `folder` would not be complete before Slurm kills the job; empty if it would. Collective."""
    left = agreement().from_rank_0(stop.seconds_left())
    takes = agreement().from_rank_0(checkpoints.expected_save_seconds(folder))
    if left is None or takes is None or takes * _SAVE_MARGIN < left:
        return ""
    return f"a save takes {takes:.0f} s, and {left:.0f} s are left"


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes of it, on every rank: only one looks at the folder, and the others see what it saw."""
    return agreement().from_rank_0(make() if is_rank_0() else None)


def is_rank_0() -> bool:
    """Whether this rank looks at folders for all."""
    return bool(dist.get_rank() == 0)


def _newest_good(folder: Path) -> tuple[int, dict[int, list[str]]]:
    """And what is wrong with the newer ones."""
    candidates = from_rank_0(lambda: [each.step for each in checkpoints.committed(folder)])
    bad: dict[int, list[str]] = {}
    for step in candidates:
        problems = verify(checkpoints.step_folder(folder, step))
        if not problems:
            return step, bad
        bad[step] = problems
    were_some: bool = bool(candidates) or from_rank_0(lambda: bool(checkpoints.commits(folder)))
    if were_some:
        # All stays as it is: what is missing may be put back, or a file system may become readable again.
        raise from_rank_0(lambda: _nothing_usable(folder, bad))
    return -1, bad


def _is_saved(path: Path) -> bool:
    if (path / checkpoints.COMMIT_FILE).exists():
        return True
    if path.exists():
        _set_aside(path, checkpoints.PARTIAL, ["a save that was never committed"])
    return False


def _set_aside(path: Path, kind: str, problems: list[str]) -> None:
    aside = checkpoints.set_aside(path, kind, problems)
    _logger.error(f"Checkpoint {path} is set aside as {aside.name}:")
    for problem in problems:
        _logger.error(f"  {problem}")


def _nothing_usable(folder: Path, bad: dict[int, list[str]]) -> NoUsableCheckpointError:
    steps = [f"step {step}: {', '.join(problems)}" for step, problems in bad.items()]
    steps += [
        f"step {each.step}: never committed"
        for each in checkpoints.list_checkpoints(folder)
        if each.state == checkpoints.UNCOMMITTED
    ]
    return NoUsableCheckpointError(
        f"no usable checkpoint in {folder} ({'; '.join(steps) or 'all are gone'}); nothing was started from step 0; "
        f"restore one, or remove the folder to begin again"
    )
