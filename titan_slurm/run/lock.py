"""What a run is made of, so that it can be made again: `lock.json`, written when it is submitted and completed by its
first attempt, and an `environment.json` in every attempt with what was another there.

`lock.json` has

    time, user, host, command, working_directory   of the submission; `command` without secrets
    recipe             name, version, hash: of the resolved recipe
    seed
    code               hash: of the run's own copy of the code, in `code/`; script: of a user's script and the modules
                       beside it, in `training_script/`, where one trains; package, working_directory: their git
                       commit; changed, whether there were uncommitted changes, null where git did not say, and
                       unanswered, why not; these as a patch in `patches/` for `git apply`, as far as nothing in it had
                       to be redacted; left_out, changed files that may hold secrets; untracked, the first hundred of
                       untracked_count
    python, packages   where it was submitted
    data               name, path and fingerprint of each thing that the run reads: data, tokenizer, …
    trained            what its first attempt found where it trained: versions, packages, nodes, processors, gpus; and
                       assets, what it made of its data
    reproduces         the run that this one is to be equal to: name, path
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = 1

# What training depends on. A run that goes on with another one of these may not go on with the same numbers.
VERSIONS = ("python", "titan-slurm", "torch", "torchtitan", "cuda", "driver", "nccl")

_WHOLE_BYTES = 4 * 2**20
_PIECE_BYTES = 2**20
_READ_AT_MOST_BYTES = 256 * 2**20
# The rest of a tokenizer's folder may be a model's weights.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def packages() -> dict[str, str]:
    """Every installed package's version, by its normalized name."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        # Asked for once: each time it is read and parsed anew.
        about = each.metadata
        # The first one on the path is the one that is imported; a broken one has no name.
        if name := about["Name"]:
            found.setdefault(name.lower().replace("_", "-"), about["Version"])
    return dict(sorted(found.items()))


def python_version() -> str:
    """Of this interpreter."""
    return platform.python_version()


def processor() -> str:
    """What the kernel calls this machine's processor: sums come out otherwise on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(packages: dict[str, str], python: str, own: str, code: str) -> dict[str, str]:
    """By the names of VERSIONS, as far as they can be told without torch. `own` is titan-slurm's version and `code` the
    hash of its code, which tells two states of a checkout apart."""
    found = {name: packages[name] for name in ("torch", "torchtitan") if name in packages}
    return {"python": python, "titan-slurm": f"{own}+{code[:12]}"} | found


def submitted_versions(locked: dict[str, Any]) -> dict[str, str]:
    """The same of where a run was submitted, from its lock."""
    code = locked["code"]
    return versions(locked["packages"], locked["python"], code["version"], code["hash"])


def code_files(folder: Path) -> Iterator[Path]:
    """The files of a folder of code, relative to it and in order; without what Python compiles from them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder)


def code_hash(folder: Path) -> str:
    """One SHA-256 of names and contents of a folder of code; empty if there is none."""
    whole = hashlib.sha256()
    empty = True
    for name in code_files(folder):
        content = (folder / name).read_bytes()
        whole.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
        empty = False
    return "" if empty else whole.hexdigest()


def fingerprint(path: Path) -> dict[str, Any] | None:
    """What tells a file, or a folder of files, from another: number, size, time of the newest, and one SHA-256 over the
    names, sizes and contents. None if it is not there.

    Of a file of more than 4 MiB only the first, the middle and the last MiB are read, and of all files together at most
    256 MiB; of those after that the hash knows only names and sizes. So terabytes take a second, and an edit in the
    middle of a large file that keeps its size shows only in the time.
    """
    if not path.exists():
        return None
    whole = hashlib.sha256()
    files, newest = 0, 0.0
    size, read = 0, 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        about = file.stat()
        files, size, newest = files + 1, size + about.st_size, max(newest, about.st_mtime)
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        whole.update(f"{name}\0{about.st_size}\0".encode())
        for offset, length in _pieces(about.st_size):
            if read + length <= _READ_AT_MOST_BYTES:
                read += length
                with file.open("rb") as content:
                    content.seek(offset)
                    whole.update(content.read(length))
    return {"files": files, "bytes": size, "newest": newest, "sha256": whole.hexdigest()}


def _pieces(size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE_BYTES:
        return [(0, size)]
    return [(offset, _PIECE_BYTES) for offset in (0, size // 2, size - _PIECE_BYTES)]


def tokenizer_fingerprint(folder: Path) -> dict[str, Any] | None:
    """The SHA-256 of each file of a tokenizer; None if it is not there."""
    if not folder.is_dir():
        return None
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return {"sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}


def is_same(path: Path, locked: dict[str, Any]) -> bool:
    """Whether what is at `path` is what was fingerprinted; not read where size and time are as they were."""
    if "files" not in locked:
        return tokenizer_fingerprint(path) == locked
    files = [file.stat() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    looks = (len(files), sum(each.st_size for each in files), max((each.st_mtime for each in files), default=0.0))
    if looks == (locked["files"], locked["bytes"], locked["newest"]):
        return True
    now = fingerprint(path)
    return now is not None and now["sha256"] == locked["sha256"]


def differences(locked: dict[str, Any], here: dict[str, Any]) -> dict[str, list[Any]]:
    """What is not the same, by name: [locked, here]. None where it is on one side only."""
    names = sorted(locked.keys() | here.keys())
    return {name: [locked.get(name), here.get(name)] for name in names if locked.get(name) != here.get(name)}
