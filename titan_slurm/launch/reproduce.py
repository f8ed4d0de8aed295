"""A run made again from its lock: the same plan, code, seed and data, in a run of its own that begins at step 0."""

import contextlib
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

import titan_slurm
from titan_slurm.cluster import local
from titan_slurm.errors import BadInputError, bad_input
from titan_slurm.launch import create, place, script
from titan_slurm.launch import lock as locks
from titan_slurm.launch.executors import executor
from titan_slurm.launch.submit import submit_new
from titan_slurm.recipe.schema import CheckpointingSection
from titan_slurm.run import checkpoints, lock
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, write_atomic, write_json
from titan_slurm.run.find import find_run
from titan_slurm.run.plan import Plan
from titan_slurm.toml import read as read_toml

# Where a run saves whose recipe does not say it.
_SAVE_DIR = str(CheckpointingSection.model_fields["save_dir"].default)


@dataclass(frozen=True)
class Reproduction:
    """A run that could be submitted to reproduce another: nothing of it is on disk yet."""

    source: RunDirectory
    run: RunDirectory
    values: dict[str, Any]
    """Its plan, as plain values: the code that reads them is the source's, which may know other fields."""
    script: str
    differences: list[str]
    """What cannot be the same here, or cannot be known to be, a line each."""

    @property
    def plan(self) -> Plan:
        """Its plan."""
        return Plan.from_dict(self.values)


def find_source(text: str, runs: Path) -> tuple[RunDirectory, int | None]:
    """The run that a user means, and the step if it was named by one of its checkpoints. Raises BadInputError."""
    path = Path(text).absolute()
    if not (path / checkpoints.COMMIT_FILE).exists():
        return find_run(text, runs), None
    commit = checkpoints.read_commit_or_problem(path)
    if isinstance(commit, str):
        raise bad_input(text, f"is no checkpoint that can be used: {commit}")
    # Beside its run, wherever that has been moved; or elsewhere, by what it says itself.
    for folder in (*path.parents, *([Path(commit.run)] if commit.run else [])):
        if RunDirectory(folder).exists():
            return find_run(str(folder), runs), commit.step
    raise bad_input(text, f"the run that made it is not there any more: {commit.run or 'it does not say which'}")


def prepare(source: RunDirectory, step: int | None, name: str | None, runs: Path) -> Reproduction:
    """Plan a run that does again what `source` did, up to `step` if it is given. Writes nothing.

    Raises BadInputError if the source has no lock or no code any more, or if the new run has no place here.
    """
    locked = locks.lock_of(source)
    if locked.get("schema") != lock.SCHEMA or not source.code_folder.is_dir():
        raise bad_input(str(source.path), "has no lock of this titan-slurm, or no copy of its code")
    name = name or _free_name(source.name, runs)
    create.check_name(name)
    run = RunDirectory(runs / name)
    if run.exists():
        raise bad_input("--name", f"there is a run {name} already: {run.path}", "choose another name")
    values = _values(source, run, step)
    plan = Plan.from_dict(values)
    differences = [*_differences(source, locked, plan)]
    return Reproduction(source, run, values, executor(plan, run).script(), differences)


def submit(prepared: Reproduction) -> dict[str, Any]:
    """Make the run and submit its job; returns the job's record. Raises BadInputError if the scheduler refuses."""
    create.make(prepared.run, lambda new: _fill(new, prepared))
    return submit_new(prepared.plan, prepared.run)


def _free_name(name: str, runs: Path) -> str:
    candidates = (f"{name[:90]}-again" + (f"-{number}" if number > 1 else "") for number in range(1, 1000))
    return next(each for each in candidates if not (runs / each).exists())


def _values(source: RunDirectory, run: RunDirectory, step: int | None) -> dict[str, Any]:
    """The source's plan with another name and place."""
    values = read_json(source.plan_file) or {}
    values |= {"name": run.name, "run_id": f"{run.name[:40]}-{secrets.token_hex(4)}"}
    values["torchtitan"]["checkpoint.folder"] = str(_checkpoints_folder(values, source, run))
    if step is not None:
        values["torchtitan"]["training.steps"] = step
        values["values"]["training.max_steps"] = {"value": step, "from": f"the checkpoint of step {step}"}
    plan = Plan.from_dict(values)
    if plan.profile is not None and (profile := place.restored(plan)):
        mounts, unseen = place.mounts(profile, run, [plan.data, plan.model, plan.torchtitan])
        if unseen:
            raise BadInputError(unseen)
        values["profile"]["mounts"] = mounts
    return values


def _checkpoints_folder(values: dict[str, Any], source: RunDirectory, run: RunDirectory) -> Path:
    """Where the new run saves: in its own folder as the source did in its, wherever that was then, or beside the
    source's outside of it."""
    saved = Path(values["torchtitan"]["checkpoint.folder"])
    if saved.is_relative_to(source.path):
        return run.path / saved.relative_to(source.path)
    given = Path(values["values"].get("checkpointing.save_dir", {}).get("value", _SAVE_DIR)).expanduser()
    if not given.is_absolute():
        return run.path / given
    return saved.parent / run.name if os.access(saved.parent, os.W_OK | os.X_OK) else run.path / _SAVE_DIR


def _fill(run: RunDirectory, prepared: Reproduction) -> None:
    """Write the new run; last the plan, which makes the folder a run."""
    source = prepared.source
    locked = locks.lock_of(source)
    locks.take_code(run, locks.copy_of_code(source))
    if (source.path / "patches").is_dir():
        shutil.copytree(source.path / "patches", run.path / "patches")
    if prepared.plan.script:
        shutil.copytree(source.script_folder, run.script_folder, ignore=shutil.ignore_patterns("__pycache__"))
    if source.assets_folder.is_dir() and not _asset_problems(source, locked):
        shutil.copytree(source.assets_folder, run.assets_folder, copy_function=locks.share)
    original = {"name": source.name, "path": str(source.path), "trained": locked.get("trained", {})}
    kept = {name: locked[name] for name in ("recipe", "seed", "code", "data")}
    locks.put(run, locks.submission() | kept | {"reproduces": original})
    _write_recipe(run, prepared)
    write_atomic(run.script_file, prepared.script)
    write_json(run.plan_file, prepared.values)


def _write_recipe(run: RunDirectory, prepared: Reproduction) -> None:
    text = prepared.source.recipe_file.read_text(encoding="utf-8")
    if prepared.plan.max_steps != prepared.source.plan().max_steps:
        tables = read_toml(prepared.source.recipe_file).tables
        tables.setdefault("training", {})["max_steps"] = prepared.plan.max_steps
        text = tomli_w.dumps(tables)
    write_atomic(run.recipe_file, text)


def _differences(source: RunDirectory, locked: dict[str, Any], plan: Plan) -> list[str]:
    problems = []
    trained = locked.get("trained", {})
    if lock.code_hash(locks.copy_of_code(source)) != locked["code"]["hash"]:
        problems.append("the run's copy of the code was changed after it was submitted")
    if plan.script and lock.code_hash(source.script_folder) != locked["code"].get("script"):
        problems.append("the run's copy of the script was changed after it was submitted, or was never hashed")
    if locked["code"]["version"] != titan_slurm.__version__:
        problems.append(f"titan-slurm {titan_slurm.__version__} submits what {locked['code']['version']} trained")
    if script.python_of_ranks(plan) == sys.executable:
        then = trained.get("versions") or lock.submitted_versions(locked)
        here = {name: version for name, version in locks.versions_here().items() if name != "titan-slurm"}
        for name, (was, now) in lock.differences({name: then.get(name) for name in here}, here).items():
            problems.append(f"{name} was {was} and is {now} here")
    else:
        problems.append(
            "the versions in the environment that the cluster profile sets up are not known before it starts"
        )
    return [
        *problems,
        *_machine(trained, plan),
        *_data_problems(source, locked, plan),
        *_saved_elsewhere(source, plan),
        *_past(source),
    ]


def _saved_elsewhere(source: RunDirectory, plan: Plan) -> list[str]:
    given = str(plan.values.get("checkpointing.save_dir", {}).get("value", _SAVE_DIR))
    there, here = source.checkpoints_folder.parent, Path(plan.torchtitan["checkpoint.folder"])
    if not Path(given).expanduser().is_absolute() or here.parent == there or there.is_relative_to(source.path):
        return []
    return [f"it saved its checkpoints below {there}, which cannot be written here; they go to {here}"]


def _machine(trained: dict[str, Any], plan: Plan) -> list[str]:
    gpus = trained.get("gpus", [])
    problems = []
    if plan.cluster == "local" and plan.device == "cuda" and local.gpu_count() < plan.layout.world_size:
        had = f"{plan.layout.world_size} GPUs ({', '.join(gpus)})"
        problems.append(f"it trained on {had}, and here are {local.gpu_count()}")
    elif plan.device == "cuda":
        problems.append(f"it trained on {', '.join(gpus) or 'GPUs that nobody noted'}; another kind rounds otherwise")
        if not plan.torchtitan.get("debug.deterministic"):
            problems.append("training.deterministic = false: a GPU may round otherwise from run to run")
    elif trained.get("processors") not in (None, [lock.processor()]) and plan.cluster == "local":
        problems.append(f"it trained on {', '.join(trained['processors'])}, and this is {lock.processor()}")
    return problems


def _data_problems(source: RunDirectory, locked: dict[str, Any], plan: Plan) -> list[str]:
    problems = []
    assets = locked.get("trained", {}).get("assets")
    if assets and not source.assets_folder.is_dir():
        problems.append("what the run had made of its data is gone, and is made again")
    elif assets:
        problems += _asset_problems(source, locked)
    for name, known in locked["data"].items():
        path = known["path"]
        if known["fingerprint"] is None:
            if path is not None or (name == "data" and not plan.data["map_style"]):
                problems.append(f"the {name} {path or known['name']} was never fingerprinted: it may be another by now")
        elif not Path(path).exists():
            problems.append(f"the {name} in {path} is gone")
        elif not lock.is_same(Path(path), known["fingerprint"]):
            problems.append(f"the {name} in {path} is not what it was")
    return problems


def _asset_problems(source: RunDirectory, locked: dict[str, Any]) -> list[str]:
    problems = []
    for name, known in locked.get("trained", {}).get("assets", {}).items():
        with contextlib.suppress(OSError):
            if lock.is_same(source.path / known["path"], known):
                continue
        problems.append(f"the {name} in the run's assets are not what they were, and are made again")
    return problems


def _past(source: RunDirectory) -> list[str]:
    plans = len(list((source.path / "history").glob("plan.*.json")))
    return [f"it went on under {plans + 1} plans; this is its last one, from step 0 on"] if plans else []
