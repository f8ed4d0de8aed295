"""What an attempt finds where it trains, held against the run's lock: versions, packages, GPUs, nodes, data. What is in
a lock is said in `titan_slurm.run.lock`."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import get_local_device

import titan_slurm
from titan_slurm.run import lock
from titan_slurm.run.attempt import Attempt, host
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, write_json
from titan_slurm.run.plan import Plan
from titan_slurm.run.redact import plain_variables
from titan_slurm.train.data import TEXT, tokenizer_folder, tokens_folder

_PATIENCE = timedelta(minutes=10)
_PACKAGE = Path(titan_slurm.__file__).resolve().parent
# What changes how fast or how exactly torch computes.
_VARIABLES = ("CUBLAS_", "CUDA_", "CUDNN_", "MKL_", "NCCL_", "FI_", "OMP_", "PYTHON", "PYTORCH_", "TORCH", "TRITON_")


class OtherVersionsError(RuntimeError):
    """The run was begun under other versions, and `[requeue] strict` says that it must not go on under these."""


def check(run: RunDirectory, attempt: Attempt, plan: Plan, store: TCPStore, rank: int, world_size: int) -> None:
    """Write down what this attempt finds, and say what is another than before. Collective: every rank calls it.

    Raises OtherVersionsError, on every rank, where `[requeue] strict` holds and a version is another.
    """
    store.set(_key("own", rank), json.dumps(_own(plan)))
    if rank == 0:
        keys = [_key("own", each) for each in range(world_size)]
        store.wait(keys, _PATIENCE)
        refusal = _hold_against_lock(run, attempt, plan, [json.loads(value) for value in store.multi_get(keys)])
        store.set(_key("refusal", 0), refusal or "none")
    # Packages on a shared file system may take long to list.
    store.wait([_key("refusal", 0)], _PATIENCE)
    refusal = store.get(_key("refusal", 0)).decode()
    if refusal != "none":
        raise OtherVersionsError(refusal)


def check_assets(run: RunDirectory, plan: Plan) -> None:
    """Note what the run itself has made of its data, and warn if the run that it reproduces had made something else.
    For rank 0."""
    locked = read_json(run.lock_file)
    if not locked or not run.assets_folder.is_dir() or "assets" in locked["trained"]:
        return
    made = {"tokens": Path(tokens_folder(run, plan)), "tokenizer": Path(tokenizer_folder(run, plan))}
    assets = {
        name: {"path": str(path.relative_to(run.path))} | (lock.fingerprint(path) or {})
        for name, path in made.items()
        if path.is_relative_to(run.assets_folder)
    }
    locked["trained"]["assets"] = assets
    write_json(run.lock_file, locked)
    for name, known in locked.get("reproduces", {}).get("trained", {}).get("assets", {}).items():
        if assets.get(name, {}).get("sha256") != known["sha256"]:
            logger.warning(f"The {name} made here are not those of the run that this one reproduces.")


def _key(name: str, rank: int) -> str:
    return f"titan_slurm/{name}/{rank}"


def _own(plan: Plan) -> dict[str, Any]:
    """What only this rank can tell."""
    found: dict[str, Any] = {"host": host(), "processor": lock.processor()}
    if plan.device == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
        gpu = torch.cuda.get_device_name(get_local_device())
        found |= {"gpu": gpu, "driver": _driver(), "cuda": torch.version.cuda, "nccl": nccl}
    return found


def _driver() -> str | None:
    """The version of NVIDIA's kernel module."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _hold_against_lock(run: RunDirectory, attempt: Attempt, plan: Plan, ranks: list[dict[str, Any]]) -> str:
    """Write the attempt's environment, and what of the lock the first attempt has to tell. Returns why the run must not
    go on here; empty if it may."""
    locked = read_json(run.lock_file) or {}
    found = _found(ranks)
    trained = locked.get("trained")
    original = locked.get("reproduces", {}).get("trained")
    # Of the machine on which the run was submitted the lock knows no GPU.
    submitted = {"versions": lock.submitted_versions(locked), "packages": locked["packages"]} if locked else {}
    differs = _differences(trained or original or submitted, found)
    changed = _changed_data(locked)
    attempt.set_environment(_environment(attempt, found, differs | changed))
    if locked and run.code_folder.resolve() / _PACKAGE.name != _PACKAGE:
        logger.warning(f"The ranks run the code in {_PACKAGE}, not the run's own copy in {run.code_folder}.")
    for name, (path, what) in changed.items():
        logger.warning(f"The {name} in {path} {what}.")
    if locked and not trained:
        write_json(run.lock_file, locked | {"trained": {"attempt": attempt.number, "time": time.time()} | found})
    if not (trained or original):
        return ""
    said = {name: f"{name} was {then} and is {now}" for name, (then, now) in differs.items() if "package " not in name}
    for line in said.values():
        logger.warning(f"Not as {'when this run began' if trained else 'in the run that this one reproduces'}: {line}.")
    if packages := len(differs) - len(said):
        logger.warning(f"{packages} other packages differ as well: see {attempt.path / 'environment.json'}.")
    others = [said[name] for name in lock.VERSIONS if name in said]
    if others and trained and plan.requeue.get("strict"):
        return f"{'; '.join(others)} ([requeue] strict = true)"
    return ""


def _found(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a lock remembers of where it trained."""
    packages = lock.packages()
    return {
        "versions": _versions(packages, ranks),
        "packages": packages,
        "nodes": _nodes(ranks),
        "processors": sorted({each["processor"] for each in ranks}),
        "gpus": sorted({each["gpu"] for each in ranks if "gpu" in each}),
    }


def _environment(attempt: Attempt, found: dict[str, Any], differs: dict[str, Any]) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "time": time.time(),
        "differs": differs,
        "python": sys.executable,
        "code": str(_PACKAGE),
        "variables": plain_variables(_VARIABLES),
        **{name: value for name, value in found.items() if name != "packages"},
    }


def _versions(packages: dict[str, str], ranks: list[dict[str, Any]]) -> dict[str, str | None]:
    """By the names of `lock.VERSIONS`; where nodes differ, all that there are."""
    found: dict[str, str | None] = {}
    for name in ("cuda", "driver", "nccl"):
        found[name] = ", ".join(sorted({each[name] for each in ranks if each.get(name)})) or None
    code = lock.code_hash(_PACKAGE)
    return lock.versions(packages, lock.python_version(), titan_slurm.__version__, code) | found


def _nodes(ranks: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The GPUs of each node that the ranks use."""
    nodes: dict[str, list[str]] = {}
    for each in ranks:
        nodes.setdefault(each["host"], []).extend([each["gpu"]] if "gpu" in each else [])
    return nodes


def _differences(locked: dict[str, Any], found: dict[str, Any]) -> dict[str, list[Any]]:
    """[locked, here] by name, of what the lock knows. Where nodes differ among each other, what none had before."""
    differs: dict[str, list[Any]] = {}
    for name, then in locked.get("versions", {}).items():
        now = found["versions"].get(name)
        if not set((now or "").split(", ")) <= set((then or "").split(", ")):
            differs[name] = [then, now]
    for name in ("processors", "gpus"):
        if name in locked and not set(found[name]) <= set(locked[name]):
            differs[name] = [locked[name], found[name]]
    for name, pair in lock.differences(locked.get("packages", {}), found["packages"]).items():
        if name not in lock.VERSIONS and locked:
            differs[f"package {name}"] = pair
    return differs


def _changed_data(locked: dict[str, Any]) -> dict[str, list[Any]]:
    """[path, what is wrong] of the things that this attempt reads and that are not as they were."""
    known = {name: each for name, each in locked.get("data", {}).items() if each["fingerprint"]}
    if "trained" in locked:
        # These only the first attempt reads.
        known = {name: each for name, each in known.items() if name != "start" and each["name"] != TEXT}
    return {
        name: [each["path"], "has changed since the run was submitted"]
        for name, each in known.items()
        if not lock.is_same(Path(each["path"]), each["fingerprint"])
    }
