"""Sends a run to wandb: one wandb run over all its attempts, each step once and in order.

    python -m titan_slurm.train.wandb_sender follow RUN MODE RANK_PID     beside a rank, while it trains
    python -m titan_slurm.train.wandb_sender sync RUN                     for `titan-slurm wandb sync`

The truth is `metrics.jsonl`. This process reads it as it grows, and begins after the last step that wandb has: offline,
as its segments in `RUN/wandb` say; online, as its server says. So it may be killed at any time, as wandb's own process
may, and whoever is started next goes on from there: the next attempt on other nodes, or `sync` on a login node. What an
attempt does again after a fall-back is there already and came out the same; it is not sent again.

Beside what torchtitan logs, under its names, a step has `attempt`, and `checkpoint`: the step of the newest checkpoint
that was committed by then. The wandb run's config has torchtitan's configuration, `recipe`, `lock` and `attempts`.
"""

import bisect
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from titan_slurm.run import events
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, write_json
from titan_slurm.run.metrics import TORCHTITANS_NAMES
from titan_slurm.run.plan import Plan
from titan_slurm.run.wandb_key import wandb_key
from titan_slurm.train.wandb_courier import FINISHED, OFFLINE, ONLINE, STOPPED, disabled_by_recipe

_TURN_S = 0.5
# How long this process outlives a rank that died.
_ORPHAN_S = 5.0
# wandb's own default is longer than many a run's way from one kill to the next.
_FLUSH_S = 2.0
_INIT_S = 60.0
_LOCK_S = 60.0
# Seconds that `sync` gives a server that takes nothing.
_SYNC_S = 120.0
_NO_STEP = -1
_SEGMENTS = "offline-run-*/run-*.wandb"
# What says which state of the run has been seen on the server: up to which step, how it ended, and so on.
_SENT_FILE = "sent.json"
_NOT_OURS = ("WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_SERVICE", "WANDB_SWEEP_ID", "WANDB_MODE")


class NotSentError(Exception):
    """Why a run could not be sent, for people."""


class BusyError(NotSentError):
    """Another process is at it."""


class Rows:
    """What is logged of a run, as wandb's rows; `sent`: the last step that wandb has."""

    def __init__(self, run: RunDirectory, sent: int) -> None:
        self.sent = sent
        self._metrics = _Tail(run.metrics_file)
        self._events = _Tail(run.events_file)
        self._events_read = 0.0
        self._commits: list[tuple[float, int]] = []
        self._validates = _validation_steps(run.plan())
        self._open: tuple[int, dict[str, Any]] | None = None

    def new(self, *, ended: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """The steps that are complete since the last call. A step's validation comes after it, so a step is complete
        when a later one is there, or, where the training has `ended`, when none of it is to come."""
        for line in self._metrics.new():
            step = line["step"]
            if self._open and step > self._open[0]:
                yield self._complete()
            if step > self.sent:
                row = self._row(line)
                # Of a step that was done again the first result stands, as it does on the server.
                self._open = (step, row | self._open[1]) if self._open and self._open[0] == step else (step, row)
        if ended and self._open:
            step, row = self._open
            if not self._validates(step) or TORCHTITANS_NAMES["validation_loss"] in row:
                yield self._complete()

    def _complete(self) -> tuple[int, dict[str, Any]]:
        assert self._open is not None
        step, row = self._open
        self.sent, self._open = step, None
        return step, row

    def _row(self, line: dict[str, Any]) -> dict[str, Any]:
        row = {other: line[name] for name, other in TORCHTITANS_NAMES.items() if name in line} | line.get("more", {})
        # torchtitan has one rate for each of its optimizers, a script of the user's own only this one.
        ours = ["attempt", "tokens", "tokens_per_second", "step_seconds", "data_seconds"]
        ours += [] if any(name.startswith("lr") for name in row) else ["lr"]
        row |= {name: line[name] for name in ours if name in line}
        row |= dict(_flat("ranks", line.get("ranks", {})))
        return row | {"checkpoint": self._checkpoint(line["time"]), "_timestamp": line["time"]}

    def _checkpoint(self, at: float) -> int:
        """The step of the newest one that was committed by then; 0 if there was none."""
        if at > self._events_read:
            self._read_events()
        before = bisect.bisect_right(self._commits, at, key=lambda commit: commit[0])
        return self._commits[before - 1][1] if before else 0

    def _read_events(self) -> None:
        self._events_read = time.time()
        committed = (each for each in self._events.new() if each["event"] == events.SAVE_COMMITTED)
        self._commits += [(each["time"], each["step"]) for each in committed]

    def newest_checkpoint(self) -> int:
        """The step of the newest one by now; 0 if there is none."""
        self._read_events()
        return self._commits[-1][1] if self._commits else 0


class _Tail:
    """The whole lines of a JSON-lines file as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The lines since the last call; one that was cut short by a kill is passed over."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def _flat(name: str, values: Any) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{name}/{key}", value)
        elif isinstance(value, int | float):
            yield f"{name}/{key}", value


def _validation_steps(plan: Plan) -> Any:
    """Whether a step has a validation, as torchtitan decides it."""
    if not plan.torchtitan.get("validator.enable"):
        return lambda step: False  # noqa: ARG005 (the other one's signature)
    every = int(plan.torchtitan["validator.freq"])
    return lambda step: step == 1 or step % every == 0


def last_step_offline(folder: Path) -> int:
    """The last step in a run's offline segments, read by wandb's own reader; -1 if there is none."""
    # Steps only rise, so that the segment that was written last decides; an attempt may have logged none.
    for segment in sorted(folder.glob(_SEGMENTS), key=lambda path: path.stat().st_mtime, reverse=True):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
        # It writes a log of its own, elsewhere into the folder that it is called in.
        environment = os.environ | {"WANDB_DIR": str(folder.parent)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment) as reader:
            assert reader.stdout is not None
            last = max((_step(line) for line in reader.stdout if b'"type":"history"' in line), default=_NO_STEP)
        if reader.returncode:
            # Of one that was cut short, or altered in its middle, it reads what there is.
            raise NotSentError(f"wandb cannot read {segment}")
        if last != _NO_STEP:
            return last
    return _NO_STEP


def _step(line: bytes) -> int:
    return int(json.loads(line)["history"]["step"].get("num", 0))


class _Rank:
    """The rank that this process serves: whether it still trains, and how long it waits when it does not."""

    def __init__(self, process_id: int) -> None:
        self.last_word = ""
        self.ended = threading.Event()
        self._process_id = process_id
        threading.Thread(target=self._attend, daemon=True).start()

    def _attend(self) -> None:
        # Its data workers may hold the other end of the pipe for longer than it lives.
        while not select.select([0], [], [], _TURN_S)[0] and os.getppid() == self._process_id:
            pass
        words = os.read(0, 100).split() if select.select([0], [], [], 0)[0] else []
        self.last_word = words[0].decode() if words else ""
        self.ended.set()
        time.sleep(float(words[1]) if words else _ORPHAN_S)
        print("no time is left", flush=True)
        _end(1)


def follow(run: RunDirectory, mode: str, rank_process_id: int) -> None:
    """Send what the rank logs until it ends."""
    os.nice(19)
    rank = _Rank(rank_process_id)
    folder = run.wandb_folder
    folder.mkdir(exist_ok=True)
    # The process that the rank before had may still be at its last steps.
    with _only_one(folder, mode, patience=_LOCK_S):
        sent = last_step_offline(folder) if mode == OFFLINE else _NO_STEP
        wandb_run = _open(run, mode, folder, x_stats_pid=rank_process_id)
        if mode == ONLINE:
            sent = _last_step_online(wandb_run)
        print(f"{mode}: wandb has the steps up to {sent}", flush=True)
        rows, described = Rows(run, sent), False
        while True:
            # Asked before the rows are read: what comes last has come by then.
            ended = rank.ended.is_set()
            for step, row in rows.new(ended=ended):
                if not described:
                    _describe(wandb_run, run)
                    described = True
                wandb_run.log(row, step=step, commit=True)
            if ended:
                break
            if signal.SIGTERM in signal.sigpending():
                # It went to every process here, and wandb's own has ended by it: whoever is started next has another.
                raise NotSentError("SIGTERM has ended wandb's own process")
            rank.ended.wait(_TURN_S)
        if rank.last_word == STOPPED:
            wandb_run.mark_preempting()
        _finish(wandb_run, rows, 0 if rank.last_word == FINISHED else 1)
        print(f"wandb has the steps up to {rows.sent}", flush=True)


def sync(run: RunDirectory) -> str:
    """Send to wandb's server what it does not have. Returns what was done. Raises NotSentError."""
    if disabled_by_recipe(run.plan()):
        return "wandb is disabled in its recipe"
    folder = run.wandb_folder
    folder.mkdir(exist_ok=True)
    logged = [step for step, _ in Rows(run, _NO_STEP).new(ended=True)]
    if not logged:
        return "nothing is logged yet"
    # As it is before it is sent: what happens meanwhile is sent the next time.
    state = _state(run, logged[-1])
    if (read_json(folder / _SENT_FILE) or {}).get("state") == state:
        return f"nothing new since step {logged[-1]}"
    try:
        with _only_one(folder, ONLINE), tempfile.TemporaryDirectory() as scratch:
            before, address = _send_rest(run, Path(scratch))
            after = _step_by_server(run, Path(scratch)) if before < logged[-1] else before
    except BusyError as busy:
        return str(busy)
    if after < logged[-1]:
        raise NotSentError(f"the server has the steps up to {after}, and {logged[-1]} are logged; try again later")
    write_json(folder / _SENT_FILE, {"state": state, "time": time.time()})
    _mark_synced(folder)
    sent = sum(step > before for step in logged)
    return f"sent {sent} steps, up to {after}: {address}" if sent else f"every step up to {after} is there: {address}"


def _state(run: RunDirectory, step: int) -> dict[str, Any]:
    """All of a run that wandb shows and that may change after its last step."""
    return {
        "step": step,
        "exit_code": _exit_code(run),
        "checkpoint": Rows(run, step).newest_checkpoint(),
        "verdicts": [(each.verdict() or {}).get("verdict") for each in run.attempts()],
    }


def _send_rest(run: RunDirectory, scratch: Path) -> tuple[int, str]:
    """Send what the server has not got. Returns the last step that it had before, and the run's address."""
    code = _exit_code(run)
    # A run that goes on is not to be shown as finished.
    wandb_run = _open(run, ONLINE, scratch, x_disable_stats=True, x_update_finish_state=code is not None)
    before = _last_step_online(wandb_run)
    _describe(wandb_run, run)
    rows = Rows(run, before)
    for step, row in rows.new(ended=True):
        wandb_run.log(row, step=step, commit=True)
    _finish(wandb_run, rows, code or 0)
    return before, wandb_run.url


def _finish(wandb_run: Any, rows: Rows, exit_code: int) -> None:
    """Wait until wandb has everything."""
    if checkpoint := rows.newest_checkpoint():
        # The last one is committed after the last step.
        wandb_run.summary["checkpoint"] = checkpoint
    wandb_run.finish(exit_code=exit_code)


def _step_by_server(run: RunDirectory, scratch: Path) -> int:
    """The last step that the server has by now."""
    wandb_run = _open(run, ONLINE, scratch, x_disable_stats=True, x_update_finish_state=False)
    wandb_run.finish()
    return _last_step_online(wandb_run)


def _exit_code(run: RunDirectory) -> int | None:
    """0 for a run that has finished, 1 for one that has failed or was cancelled, None for one that goes on."""
    attempts = run.attempts()
    if attempts and attempts[-1].finished():
        return 0
    verdict = attempts[-1].verdict() if attempts else None
    return 1 if verdict and not verdict.get("again") else None


def _open(run: RunDirectory, mode: str, folder: Path, **settings: Any) -> Any:
    """The wandb run; `folder`: a `wandb` for its files, or where one is to be made. Raises NotSentError."""
    plan = run.plan()
    for name in _NOT_OURS:
        os.environ.pop(name, None)
    # wandb's own files in the user's home would be written by every node at once; its reports on itself need a network.
    os.environ.update(WANDB_DATA_DIR=str(folder / "data"), WANDB_CACHE_DIR=str(folder / "cache"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        return wandb.init(
            mode="online" if mode == ONLINE else "offline",
            id=plan.run_id,
            resume="allow",
            name=plan.name,
            project=plan.wandb["project"],
            # The names by which torchtitan's own logger takes them.
            entity=plan.wandb["entity"] or os.environ.get("WANDB_TEAM"),
            group=plan.wandb["group"] or os.environ.get("WANDB_RUN_GROUP"),
            notes=os.environ.get("WANDB_RUN_NOTES"),
            job_type=os.environ.get("WANDB_RUN_JOB_TYPE"),
            tags=plan.wandb["tags"],
            dir=str(folder.parent if folder.name == "wandb" else folder),
            settings=wandb.Settings(
                # What ranks print is in the run, and what this process prints is nobody's result.
                console="off",
                quiet=True,
                disable_git=True,
                save_code=False,
                disable_job_creation=True,
                init_timeout=_INIT_S,
                finish_timeout=_SYNC_S,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=_FLUSH_S,
                **settings,
            ),
        )
    except Exception as error:
        server = os.environ.get("WANDB_BASE_URL", "wandb's server")
        raise NotSentError(f"{server}: {type(error).__name__}: {str(error).strip() or 'no answer'}") from None


def _last_step_online(wandb_run: Any) -> int:
    return int(wandb_run.starting_step) - 1 if wandb_run.resumed else _NO_STEP


def _describe(wandb_run: Any, run: RunDirectory) -> None:
    """What the run is, beside its curve: torchtitan's configuration, recipe, lock and attempts."""
    attempts = run.attempts()
    known = next((found for each in reversed(attempts) if (found := each.configuration())), {})
    more = {
        "recipe": tomllib.loads(run.recipe_file.read_text(encoding="utf-8")),
        "lock": _without_packages(read_json(run.lock_file) or {}),
        "attempts": {str(each.number): _about(each) for each in attempts},
    }
    wandb_run.config.update(known | more, allow_val_change=True)
    for file in (run.plan_file, run.recipe_file, run.lock_file):
        if file.is_file():
            # A copy, not a link: a segment may be carried elsewhere to be sent.
            copy = shutil.copy(file, wandb_run.dir)
            wandb_run.save(copy, base_path=wandb_run.dir, policy="now")


def _without_packages(lock: dict[str, Any]) -> dict[str, Any]:
    """Hundreds of versions hide the rest; wandb has them in a file."""
    return {
        name: _without_packages(value) if isinstance(value, dict) else value
        for name, value in lock.items()
        if name != "packages"
    }


def _about(attempt: Attempt) -> dict[str, Any]:
    facts, verdict = attempt.facts(), attempt.verdict() or {}
    about = {name: facts.get(name) for name in ("started", "job_id", "nodes", "saved_step")}
    return about | {"verdict": verdict.get("verdict"), "reason": verdict.get("reason")}


def _mark_synced(folder: Path) -> None:
    """Have wandb's own `sync` pass over the segments and its `clean` remove them, without the one being written."""
    segments = sorted(folder.glob(_SEGMENTS))
    try:
        with _only_one(folder, OFFLINE):
            pass
    except NotSentError:
        segments = segments[:-1]
    for segment in segments:
        segment.with_name(f"{segment.name}.synced").touch()


@contextlib.contextmanager
def _only_one(folder: Path, mode: str, patience: float = 0.0) -> Iterator[None]:
    """Two at once would both send what is not there yet. Held by the kernel: a kill frees it."""
    deadline = time.monotonic() + patience
    with (folder / f".{mode}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(
                        "another process is sending this run; a job that is online does it itself"
                    ) from None
                time.sleep(_TURN_S)
            except OSError:
                # A file system without locks.
                break
        yield


def _end(code: int) -> None:
    """Leave with everything that wandb has started, which may wait for a network for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(code)


def main() -> None:
    """What the module's docstring says."""
    try:
        match sys.argv[1:]:
            case ["follow", run, mode, rank]:
                follow(RunDirectory(Path(run)), mode, int(rank))
            case ["sync", run]:
                found = RunDirectory(Path(run))
                if not wandb_key() and not disabled_by_recipe(found.plan()):
                    print("error: no key for wandb: `wandb login`, or set WANDB_API_KEY", file=sys.stderr)
                    _end(2)
                print(f"{found.name}: {sync(found)}")
            case _:
                sys.exit(__doc__)
    except NotSentError as error:
        print(f"{Path(sys.argv[2]).name}: {error}", file=sys.stderr)
        _end(1)
    except Exception:
        traceback.print_exc()
        _end(1)


if __name__ == "__main__":
    main()
