"""Many runs of one recipe as one Slurm job array: which settings each has, their plans, and their submission. All are
planned and checked before anything is made; each is then a run like any other, whose job is a task of the array."""

import contextlib
import dataclasses
import functools
import itertools
import re
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.launch import create
from titan_slurm.launch.lock import share
from titan_slurm.launch.place import Place, beneath
from titan_slurm.launch.script import Array, array_options, array_script, sbatch_options
from titan_slurm.launch.submit import NoAnswerError, Prepared, about_job, begin_submission, refusals
from titan_slurm.launch.submit import prepare as prepare_run
from titan_slurm.recipe.resolve import Override, Value, parse_set, resolve
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_atomic, write_json
from titan_slurm.toml import Key

# What differs from run to run in any case.
_OWN_OPTIONS = ("job-name", "comment", "output")

Settings = list[Override]


@dataclass(frozen=True)
class Sweep:
    """Runs that could be submitted as one array: nothing of them is on disk yet."""

    array: Array
    folder: Path
    """For what is of the array and not of a run: its script, and `sweep.json`, which says what each run has."""
    runs: list[Prepared]
    settings: list[Settings]
    """What is set for each run by itself, in the same order."""

    @functools.cached_property
    def script(self) -> str:
        """The array's batch script. Raises BadInputError for a template that cannot be used."""
        return array_script(self.runs[0].plan, self.runs[0].run, self.array)

    @property
    def options(self) -> dict[str, Any]:
        """sbatch's options for the array."""
        return array_options(self.runs[0].plan, self.runs[0].run, self.array)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the plans, each thing once."""
        return list(dict.fromkeys(note for prepared in self.runs for note in prepared.notes))

    def varied(self, task: int) -> dict[str, Any]:
        """What a run has and not all have, by the recipe's names."""
        settings = [{".".join(one.key): one.value for one in each} for each in self.settings]
        return {
            name: value
            for name, value in settings[task].items()
            if any(name not in other or other[name] != value for other in settings)
        }

    def record(self) -> dict[str, Any]:
        """For `sweep.json`."""
        runs = [{"run": each.run.name, "settings": self.varied(task)} for task, each in enumerate(self.runs)]
        return {"name": self.array.name, "comment": self.array.comment, "at_once": self.array.at_once, "runs": runs}


def settings_of_runs(settings: Iterable[str], file: Path | None) -> list[Settings]:
    """What each run of a sweep is to have: every combination of the values of `--set key=a,b,c`, for every line of the
    file. The last named key changes fastest. Raises BadInputError with everything that is wrong."""
    problems: list[Problem] = []
    lists: list[list[Settings]] = [_lines(file, problems)] if file else []
    for text in settings:
        with _collected(problems):
            lists.append([[parse_set(each)] for each in _each_value(text)])
    found = [list(itertools.chain(*parts)) for parts in itertools.product(*lists)]
    for runs in found[:1]:
        keys = [setting.key for setting in runs]
        twice = {".".join(key) for key in keys if keys.count(key) > 1}
        problems += [Problem("--array", f"{key} is set twice", "give all its values at once") for key in sorted(twice)]
    if problems:
        raise BadInputError(problems)
    if len(found) < 2:
        hint = "--set training.learning_rate=1e-4,3e-4, say, or --array-file"
        raise bad_input("--array", "there is only one run, no setting has several values", hint)
    return found


def _lines(file: Path, problems: list[Problem]) -> list[Settings]:
    """The settings of each line of a file, written as after `--set`; `#` begins a comment."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise bad_input(f"--array-file {file}", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise bad_input(f"--array-file {file}", "is not UTF-8 text") from None
    found: list[Settings] = []
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            problems.append(Problem(where, str(error)))
            continue
        one: Settings = []
        for word in words:
            with _collected(problems, where):
                one.append(dataclasses.replace(parse_set(word), option=where))
        keys = [setting.key for setting in one]
        twice = sorted({".".join(key) for key in keys if keys.count(key) > 1})
        problems += [Problem(where, f"{key} is set twice") for key in twice]
        found += [one] if words else []
    if not found and not problems:
        problems.append(Problem(f"--array-file {file}", "has no settings", "a line per run: training.seq_len=64 …"))
    return found


@contextlib.contextmanager
def _collected(problems: list[Problem], where: str = "") -> Iterator[None]:
    """Put aside what is wrong, to be reported with the rest."""
    try:
        yield
    except BadInputError as error:
        problems += [dataclasses.replace(each, where=where or each.where) for each in error.problems]


# A value in quotes or brackets is one, whatever commas are in it.
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'[^']*'"
_PIECE = re.compile(rf"{_QUOTED}|.", re.DOTALL)


def _each_value(text: str) -> list[str]:
    """`key=a`, `key=b` … of `key=a,b`. A TOML array or table, or text in quotes, is one value."""
    key, equals, values = text.partition("=")
    parts, depth = [""], 0
    for piece in _PIECE.findall(values):
        depth += (piece in "[{") - (piece in "]}")
        if piece == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    if depth:
        return [text]
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise bad_input(f"--set {text}", "one of the values is empty", "a comma stands between two of them")
    return [f"{key}{equals}{part}" for part in parts]


def prepare(
    recipe: str | None,
    settings: list[Settings],
    *,
    place: Place,
    runs: Path,
    name: str | None,
    at_once: int | None,
    only_show: bool = False,
) -> Sweep:
    """Plan all runs, called NAME-0 and so on. Writes nothing. Raises BadInputError with everything that is wrong in
    any, each thing once."""
    if place.cluster == "local":
        what = "is a job array of Slurm's, and these runs are to be on this machine"
        raise bad_input("--array", f"{what}; {place.note}" if place.note else what)
    lowest = beneath(place.profile)
    name = name or _free_name(recipe, settings[0], runs, lowest)
    create.check_name(name)
    # Whoever has many curves wants to find them together.
    lowest.setdefault(("wandb", "group"), Value(name, "--array"))
    sweep_id = f"{name[:40]}-{secrets.token_hex(4)}"
    array = Array(name, f"titan-slurm {sweep_id}", len(settings), at_once)
    problems: list[Problem] = []
    prepared: list[Prepared] = []
    for task, one in enumerate(settings):
        with _collected(problems):
            resolved = resolve(recipe, one, beneath=lowest)
            run = prepare_run(resolved, place=place, runs=runs, name=array.run_name(task), only_show=only_show)
            plan = dataclasses.replace(run.plan, run_id=f"{sweep_id}-{task}")
            prepared.append(dataclasses.replace(run, plan=plan))
    folder = runs / name
    if folder.exists():
        problems.append(_taken(folder))
    if problems := problems or [*_unequal(prepared)]:
        raise BadInputError(dict.fromkeys(problems))
    return Sweep(array, folder, prepared, settings)


def _taken(folder: Path) -> Problem:
    """Why a sweep cannot have the folder that is there."""
    if RunDirectory(folder).exists():
        return Problem("--name", f"there is a run {folder.name} already: {folder}", "choose another name")
    if not (folder / "sweep.json").is_file():
        return Problem("--name", f"there is {folder} already", "choose another name")
    what = f"there is a sweep {folder.name} already, with its script and sweep.json in {folder}"
    hint = f"choose another name, or titan-slurm runs rm --name '{folder.name}-*'; it goes with the last of its runs"
    return Problem("--name", what, hint)


def _free_name(recipe: str | None, settings: Settings, runs: Path, lowest: Mapping[Key, Value]) -> str:
    with contextlib.suppress(BadInputError):
        return create.free_name(resolve(recipe, settings, beneath=lowest).name, runs)
    return "array"  # What is wrong is said of all runs together.


def _unequal(prepared: Sequence[Prepared]) -> Iterable[Problem]:
    """What the runs ask of Slurm and is not the same for all: the tasks of an array are jobs of one kind."""
    asked = [sbatch_options(each.plan, each.run) for each in prepared]
    for name in dict.fromkeys(name for options in asked for name in options if name not in _OWN_OPTIONS):
        values = [options.get(name) for options in asked]
        for each, value in zip(prepared, values, strict=True):
            if value != values[0]:
                what = f"sbatch's {name} is {values[0]} for {prepared[0].run.name} and {value} for {each.run.name}"
                yield Problem("--array", what, "all tasks of an array ask for the same; submit an array for each")
                break


def submit(sweep: Sweep) -> list[dict[str, Any]]:
    """Make all runs and submit them as one array. Returns the records of their jobs.

    Raises BadInputError if the scheduler refuses; then all directories are gone again.
    """
    from titan_slurm.launch.executors import call_sbatch, place_in_slurm

    place, runs = place_in_slurm(), [prepared.run for prepared in sweep.runs]
    # The same for all of them.
    dependency = sweep.runs[0].dependency
    waiting = [f"--dependency={dependency}"] if dependency else []
    refused: list[Path] = []
    try:
        with contextlib.ExitStack() as locks:
            held: list[int] = []
            first: list[RunDirectory] = []

            def fill(task: int, folder: Path) -> None:
                new = RunDirectory(folder)
                # From the moment that they have their names, the runs are in the hands of whoever submits them: all by
                # one lock, which sbatch is handed.
                if first:
                    share(str(first[0].flock_file), str(new.flock_file))
                else:
                    held.append(locks.enter_context(new.lock()))
                _write_run(new, sweep, task, place, *first)
                first[:] = first or [new]

            contents = {run.path: functools.partial(fill, task) for task, run in enumerate(runs)}
            create.make_folders(contents | {sweep.folder: functools.partial(_write_sweep, sweep)})
            try:
                with refusals(runs):
                    job_id = call_sbatch(sweep.options, *waiting, str(sweep.folder / "job.sh"), held=held)
            except BadInputError as error:
                if not (isinstance(error, NoAnswerError) and error.may_have_job):
                    refused = create.hide([*(run.path for run in runs), sweep.folder])
                raise
            records = [{"job_id": f"{job_id}_{task}"} | place | about_job() for task in range(len(runs))]
            for run, record in zip(runs, records, strict=True):
                run.add_job(record)
                run.end_submission()
                # From here on each has a lock of its own. Whoever waits for this one sees that.
                run.flock_file.unlink(missing_ok=True)
    finally:
        for folder in refused:
            shutil.rmtree(folder, ignore_errors=True)
    write_json(sweep.folder / "sweep.json", sweep.record() | {"job_id": job_id})
    return records


def _write_sweep(sweep: Sweep, folder: Path) -> None:
    write_atomic(folder / "job.sh", sweep.script)
    write_json(folder / "sweep.json", sweep.record())


def _write_run(
    run: RunDirectory, sweep: Sweep, task: int, place: dict[str, Any], first: RunDirectory | None = None
) -> None:
    from titan_slurm.launch.executors import put_task

    prepared = sweep.runs[task]
    put_task(prepared.run, run.submitit_folder)
    array = {"name": sweep.array.name, "comment": sweep.array.comment, "task": task}
    begin_submission(run, resumed=False, array=array, **place)
    create.write_contents(run, prepared.plan, prepared.resolved, prepared.script, first)
