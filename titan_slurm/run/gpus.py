"""The GPUs of a node, as NVIDIA's driver shows them: how many, which, and whether they are well."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from titan_slurm.run.finding import Finding

# A GPU that has fallen off the bus makes nvidia-smi hang.
_TIMEOUT_S = 40
_ACTIVE = "Active"
# The first name is the driver's since version 535, the second the one before.
_REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")
_FIELDS = (
    "index",
    "name",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "{reasons}.hw_thermal_slowdown",
    "{reasons}.hw_power_brake_slowdown",
)
_LOOK_AGAIN = "drain the node and have it mended; titan-slurm leaves it out where [slurm] preflight = true"


def look_at_gpus(count: int, kind: str | None) -> Iterator[Finding]:
    """`count`, and `kind` as Slurm calls it: what the job has asked for on this node."""
    if shutil.which("nvidia-smi") is None:
        yield _without_nvidia_smi(count)
        return
    try:
        rows = _query()
    except subprocess.TimeoutExpired:
        yield Finding("GPUs", f"nvidia-smi does not answer within {_TIMEOUT_S} s", _LOOK_AGAIN)
        return
    except OSError as error:
        yield Finding("GPUs", f"nvidia-smi says: {error}", _LOOK_AGAIN)
        return
    names = sorted({name for _, name, *_ in rows})
    what = f"{len(rows)} of {count} GPUs are here" + (f": {', '.join(names)}" if names else "")
    yield Finding("GPUs", what, "" if len(rows) >= count else _LOOK_AGAIN)
    if kind and names and not all(_is_kind(kind, name) for name in names):
        what = f"{', '.join(names)}, where {kind} is asked for"
        yield Finding("GPU type", what, "name another partition, constraint or gpu_type", is_warning=True)
    unwell = False
    for index, _, _, errors, retired, hot, braked in rows:
        for bad, what in (
            (errors.isdigit() and int(errors) > 0, f"{errors} memory errors that ECC could not correct"),
            (retired == "Yes", "memory pages are to be retired at its next reset"),
            (hot == _ACTIVE, "slowed down by its temperature"),
            (braked == _ACTIVE, "slowed down by its power supply"),
        ):
            if bad:
                unwell = True
                yield Finding("GPU health", f"GPU {index}: {what}", _LOOK_AGAIN)
    yield from _remapped_rows()
    if rows and not unwell:
        yield Finding("GPU health", "no memory errors, and not slowed down")


def driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where there is none."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _query() -> list[list[str]]:
    """A row for each GPU, with the values of _FIELDS."""
    failed = ""
    for reasons in _REASONS:
        fields = ",".join(_FIELDS).format(reasons=reasons)
        done = _nvidia_smi(f"--query-gpu={fields}")
        if done.returncode == 0:
            rows = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]
            # Of a lost GPU it says so in place of the values.
            return [row for row in rows if len(row) == len(_FIELDS)]
        failed = " ".join((done.stdout + done.stderr).split())
    raise OSError(failed[:300])


def _remapped_rows() -> Iterator[Finding]:
    """Memory rows that newer GPUs replace where older ones retire pages. Nothing where they have none."""
    try:
        done = _nvidia_smi("--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure")
    except subprocess.TimeoutExpired:
        return
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        bus, _, values = line.partition(",")
        # Yes or No in some versions of the driver, 1 or 0 in others.
        pending, _, failed = ("yes" if value.strip() in ("Yes", "1") else "" for value in (*values.partition(","),))
        if failed:
            yield Finding("GPU health", f"GPU at {bus}: no spare memory rows are left", _LOOK_AGAIN)
        elif pending:
            what = f"GPU at {bus}: memory rows are to be replaced at its next reset"
            yield Finding("GPU health", what, "have the GPU reset", is_warning=True)


def _nvidia_smi(query: str) -> subprocess.CompletedProcess[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
    )


def _without_nvidia_smi(count: int) -> Finding:
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if found < count:
        return Finding("GPUs", f"{found} of {count} GPUs are here, and no nvidia-smi", _LOOK_AGAIN)
    advice = "have nvidia-smi on the PATH of the job, to have their health looked at"
    return Finding("GPUs", f"{found} of {count} GPUs are here, and no nvidia-smi", advice, is_warning=True)


def _is_kind(kind: str, name: str) -> bool:
    """Sites make their own names of what the driver says: h100, H100-SXM, nvidia_h100_80gb_hbm3."""
    ours, theirs = (re.sub(r"[^a-z0-9]", "", text.lower()) for text in (kind, name))
    return ours in theirs or theirs in ours
