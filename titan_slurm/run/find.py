"""Which run a user means by a name, a path or a job id."""

import os
from pathlib import Path

from titan_slurm.errors import bad_input, did_you_mean
from titan_slurm.run.directory import RunDirectory

RUNS_VARIABLE = "TITAN_SLURM_RUNS"


def runs_folder(option: Path | None) -> Path:
    """The folder of runs: the option, or TITAN_SLURM_RUNS, or `runs` here. Absolute."""
    return (option or Path(os.environ.get(RUNS_VARIABLE) or "runs")).absolute()


def all_runs(folder: Path) -> list[RunDirectory]:
    """The runs in a folder, by name."""
    if not folder.is_dir():
        return []
    runs = (RunDirectory(path) for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [run for run in runs if run.exists()]


def unreadable(run: RunDirectory) -> str:
    """Why a run's plan cannot be read: empty if it can."""
    try:
        run.plan()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def find_run(text: str, folder: Path) -> RunDirectory:
    """The run of that name, path or job id. Raises BadInputError if there is none, or if its plan cannot be read."""
    for path in (folder / text, Path(text).absolute()):
        if RunDirectory(path).exists():
            return _checked(RunDirectory(path))
    runs = all_runs(folder)
    for run in reversed(runs):
        if any(job["job_id"] == text for job in run.jobs()):
            return _checked(run)
    tasks = [run.name for run in runs if any(job["job_id"].startswith(f"{text}_") for job in run.jobs())]
    if tasks:
        names = f"{tasks[0]} … {tasks[-1]}"
        raise bad_input("", f"job {text} is an array of {len(tasks)} runs", f"{names}: name one of them")
    where = f"no run {text!r} in {folder}"
    raise bad_input("", where, did_you_mean(text, [run.name for run in runs]))


def _checked(run: RunDirectory) -> RunDirectory:
    if why := unreadable(run):
        raise bad_input(str(run.plan_file), why)
    return run
