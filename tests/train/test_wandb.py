"""One wandb run per run: what its segments hold, read back by wandb's own reader, after a training was interrupted;
and what becomes of a training whose wandb server fails. The server is one of this machine."""

import dataclasses
import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import CommandLine
from tests.train.conftest import LocalRun
from tests.train.wandb_server import KEY, WandbServer, serving
from titan_slurm.run.attempt import new_attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import append_json_line, read_json
from titan_slurm.train.wandb_courier import Courier, mode
from titan_slurm.train.wandb_sender import Rows

LAST = 16
SETTINGS = (
    "wandb.enabled=true",
    "requeue.enabled=true",
    "requeue.crash_delay=2",
    "checkpointing.save_interval=2",
    "checkpointing.keep_latest=9",
    f"training.max_steps={LAST}",
)


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with serving() as made:
        yield made


def records(segment: Path) -> list[dict[str, Any]]:
    """What is in a segment, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def found(interrupted: LocalRun) -> list[list[dict[str, Any]]]:
    return segments(interrupted)


def segments(run: LocalRun) -> list[list[dict[str, Any]]]:
    """The records of a run's offline segments, in the order of their names."""
    return [records(path) for path in sorted(run.run.wandb_folder.glob("offline-run-*/run-*.wandb"))]


def history(segments: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of segments, one after another."""
    return [each["history"]["item"] for segment in segments for each in segment if each["type"] == "history"]


def wait_until(what: Callable[[], bool], run: LocalRun) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert time.monotonic() < deadline, run.log()[-3000:]
        time.sleep(0.05)


def steps_of(run: LocalRun, attempt: int) -> int:
    """How many steps an attempt has logged."""
    return len(run.losses(attempt))


def ranks(run: LocalRun) -> list[psutil.Process]:
    return [each for each in run.processes() if "submitit.core._submit" in each.cmdline()]


def terminate_step(run: LocalRun) -> None:
    """SIGTERM to the ranks and to all that they have started, as Slurm sends it to a step."""
    for rank in ranks(run):
        for process in (*rank.children(recursive=True), rank):
            process.terminate()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, server: WandbServer) -> LocalRun:
    """A run that was preempted, then lost a rank and its newest checkpoint with it, and was sent to the server for the
    first time while its third attempt was running."""
    run = LocalRun(tmp_path_factory.mktemp("wandb") / "mine", *SETTINGS, "wandb.mode=offline", 'wandb.tags=["a", "b"]')
    run.start()
    wait_until(lambda: steps_of(run, 1) >= 3, run)
    terminate_step(run)
    wait_until(lambda: steps_of(run, 2) >= 4, run)
    ranks(run)[1].kill()
    wait_until(lambda: run.run.attempts()[1].verdict() is not None, run)
    (run.checkpoints / f"step-{run.steps[-1]}" / "commit.json").unlink()
    wait_until(lambda: steps_of(run, 3) >= 1, run)
    run.environment = server.environment
    assert "sent" in run.titan_slurm("wandb", "sync", "mine")
    ended = run.wait()
    assert (ended.state, ended.attempts) == ("completed", 3), f"{ended}\n{run.log()[-3000:]}"
    return run


def test_every_step_is_there_once_over_all_attempts(interrupted: LocalRun, found: list[list[dict[str, Any]]]) -> None:
    verdicts = [(attempt.verdict() or {})["verdict"] for attempt in interrupted.run.attempts()]
    assert verdicts == ["preempted", "crashed", "completed"]
    assert any(line["replayed"] for line in interrupted.run.metrics())
    assert len(found) >= 3
    rows = history(found)
    assert [row["_step"] for row in rows] == list(range(1, LAST + 1))
    assert {row["_step"]: row["loss_metrics/global_avg_loss"] for row in rows} == interrupted.losses()
    names = {each["run"]["run_id"] for segment in found for each in segment if each["type"] == "run"}
    assert names == {interrupted.run.plan().run_id}


def test_attempts_and_checkpoints_are_marked(interrupted: LocalRun, found: list[list[dict[str, Any]]]) -> None:
    rows = history(found)
    attempts = [row["attempt"] for row in rows]
    assert attempts == sorted(attempts)
    assert set(attempts) == {1, 2, 3}
    assert [row["checkpoint"] for row in rows[:3]] == [0, 0, 2]
    # What torchtitan's own logger would have sent, under its names.
    names = {"loss_metrics/global_max_loss", "grad_norm", "throughput(tps)", "n_tokens_seen", "lr/AdamW"}
    assert names <= rows[0].keys()
    assert rows[1]["ranks/step_seconds/max"] > 0
    config: dict[str, Any] = {}
    for record in (each for segment in found for each in segment if each["type"] == "config"):
        config |= record["config"]["update"]
    assert config["recipe"]["training"]["max_steps"] == LAST
    assert config["training"]["steps"] == LAST
    assert config["lock"]["code"]["hash"] == (read_json(interrupted.run.lock_file) or {})["code"]["hash"]
    assert config["attempts"].keys() == {"1", "2", "3"}
    assert config["attempts"]["2"]["verdict"] == "crashed"
    [tags] = {tuple(each["run"]["tags"]) for segment in found for each in segment if each["type"] == "run"}
    assert tags == ("a", "b")
    newest = sorted(interrupted.run.wandb_folder.glob("offline-run-*"))[-1]
    assert {"lock.json", "plan.json", "recipe.toml"} <= {path.name for path in (newest / "files").iterdir()}


def test_sync_sends_each_step_once(interrupted: LocalRun, server: WandbServer) -> None:
    seen = server.runs[interrupted.run.plan().run_id]
    before = len(seen.history)
    # The job was running, and is not to be shown as one that has ended.
    assert seen.exit_codes == []
    assert f"sent {LAST - before} steps, up to {LAST}" in interrupted.titan_slurm("wandb", "sync", "mine")
    assert [line["_step"] for line in seen.history] == list(range(1, LAST + 1))
    assert seen.exit_codes == [0]
    assert {"lock.json", "plan.json", "recipe.toml"} <= seen.files
    assert seen.config["attempts"]["3"]["verdict"] == "completed"
    # wandb's own `sync` finds nothing that is left for it to do.
    found = list(interrupted.run.wandb_folder.glob("offline-run-*/*.wandb"))
    assert all(path.with_name(f"{path.name}.synced").exists() for path in found)
    asked = server.asked
    assert "nothing new" in interrupted.titan_slurm("wandb", "sync", "mine")
    assert server.asked == asked
    # What was sent is known to the server, whoever has forgotten it here.
    (interrupted.run.wandb_folder / "sent.json").unlink()
    assert f"every step up to {LAST} is there" in interrupted.titan_slurm("wandb", "sync", "mine")
    assert len(seen.history) == LAST


def test_sync_without_a_key_or_a_server(interrupted: LocalRun, server: WandbServer, tmp_path: Path) -> None:
    (interrupted.run.wandb_folder / "sent.json").unlink(missing_ok=True)
    run = LocalRun(interrupted.run.path)
    run.environment = {"NETRC": str(tmp_path / "none")}
    assert "error: no key for wandb" in run.titan_slurm("wandb", "sync", "mine", code=2)
    run.environment = server.environment
    server.ill = "401"
    assert "mine: http://127.0.0.1" in run.titan_slurm("wandb", "sync", "mine", code=1)
    server.ill = ""
    assert "no run 'other'" in run.titan_slurm("wandb", "sync", "other", code=2)


@pytest.mark.parametrize("ill", ["hangs", "dies", "401", "500", "refuses"])
def test_a_server_that_fails_holds_nobody(ill: str, interrupted: LocalRun, tmp_path: Path) -> None:
    """Without a training: what a rank starts for wandb, and that it does not wait for it in the end."""
    run = a_copy(interrupted, tmp_path / "copy")
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.ill = ill
        if ill == "refuses":
            server.close()
        courier = Courier(run.run, run.run.attempts()[0], "online")
        wait_until(lambda: ill == "refuses" or server.asked > 0, run)
        courier.finish(stopped=True, seconds_left=1.0)
        assert psutil.wait_procs(psutil.Process().children(recursive=True), 30)[1] == []
        assert server.runs == {}


def a_copy(run: LocalRun, path: Path) -> LocalRun:
    """A run of its own with the same metrics."""
    shutil.copytree(run.run.path, path, ignore=shutil.ignore_patterns("checkpoints", "wandb", "cache", "code"))
    (path / "plan.json").write_text((path / "plan.json").read_text().replace(run.run.plan().run_id, "another"))
    return LocalRun(path)


def test_a_server_that_fails_in_the_middle_costs_no_step(server: WandbServer, tmp_path: Path) -> None:
    run = LocalRun(tmp_path / "online", "wandb.enabled=true", "wandb.mode=online", "training.max_steps=6")
    run.environment = server.environment
    run.start()
    # After it has answered to what is asked first.
    wait_until(lambda: steps_of(run, 1) >= 2, run)
    server.ill = "hangs"
    try:
        assert run.wait().state == "completed"
    finally:
        server.ill = ""
    assert [line["step"] for line in run.run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert "titan-slurm wandb sync online" in run.log()
    assert "sent" in run.titan_slurm("wandb", "sync", "online")
    seen = server.runs[run.run.plan().run_id]
    assert [line["_step"] for line in seen.history] == [1, 2, 3, 4, 5, 6]
    files = [path for path in run.run.path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


class Logged:
    """A run directory in which lines are logged without a training."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def line(self, step: int, attempt: int = 1, **more: Any) -> None:
        """A training step, or with `validation_loss` a validation."""
        line = {"step": step, "time": float(step), "attempt": attempt}
        append_json_line(self.run.metrics_file, line | (more or {"loss": 1.0 / step}))

    def rows(self, sent: int = -1) -> Rows:
        """What is to be sent after a step."""
        return Rows(self.run, sent)


@pytest.fixture
def sync(cli: CommandLine, make_run: Callable[..., RunDirectory], server: WandbServer) -> Callable[..., Any]:
    """`sync(setting, …)`: makes a run without a training, of which three steps are logged. Returns it, and a function
    that sends it and returns what that said."""

    def make(*settings: str) -> tuple[RunDirectory, Callable[[], str]]:
        run = make_run(*settings, name=f"made-{len(server.runs)}", cluster="local")
        for step in (1, 2, 3):
            append_json_line(run.metrics_file, {"step": step, "time": float(step), "attempt": 1, "loss": 1.0})
        new_attempt(run.attempts_folder)

        def send() -> str:
            done = cli.process("wandb", "sync", run.name, env=server.environment)
            assert done.code == 0, done.out + done.err
            return done.out

        return run, send

    return make


def test_what_happens_after_the_last_step_was_sent_arrives(sync: Callable[..., Any], server: WandbServer) -> None:
    run, send = sync("wandb.enabled=true")
    assert "sent 3 steps, up to 3" in send()
    seen = server.runs[run.plan().run_id]
    assert seen.exit_codes == []
    [attempt] = run.attempts()
    append_json_line(run.events_file, {"time": 4.0, "event": "save_committed", "step": 3, "attempt": 1})
    attempt.finish(3)
    attempt.give_verdict("completed", "all 3 steps done", again=False)
    assert "every step up to 3 is there" in send()
    assert ([line["_step"] for line in seen.history], seen.exit_codes) == ([1, 2, 3], [0])
    assert seen.config["attempts"]["1"]["verdict"] == "completed"
    asked = server.asked
    assert "nothing new since step 3" in send()
    assert server.asked == asked


@pytest.mark.parametrize("setting", ["wandb.enabled=false", "wandb.mode=disabled"])
def test_a_run_whose_wandb_is_disabled_is_not_sent(setting: str, sync: Callable[..., Any], server: WandbServer) -> None:
    _, send = sync(setting)
    asked = server.asked
    assert "wandb is disabled in its recipe" in send()
    assert server.asked == asked


def test_a_run_that_its_job_is_sending_is_in_order(sync: Callable[..., Any]) -> None:
    run, send = sync("wandb.enabled=true")
    run.wandb_folder.mkdir()
    with (run.wandb_folder / ".online.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is sending this run; a job that is online does it itself" in send()


@pytest.fixture
def logged(interrupted: LocalRun, tmp_path: Path) -> Logged:
    run = a_copy(interrupted, tmp_path / "logged").run
    for file in (run.metrics_file, run.events_file):
        file.unlink()
    plan = json.loads(run.plan_file.read_text())
    plan["torchtitan"] |= {"validator.enable": True, "validator.freq": 4}
    run.plan_file.write_text(json.dumps(plan))
    return Logged(run)


def test_a_step_is_sent_when_it_is_complete(logged: Logged) -> None:
    rows = logged.rows()
    logged.line(1)
    logged.line(1, validation_loss=2.0)
    assert list(rows.new()) == []
    logged.line(2)
    [(step, row)] = rows.new()
    assert (step, row["loss_metrics/global_avg_loss"], row["validation_metrics/loss"]) == (1, 1.0, 2.0)
    # The last one of a rank that dies; but a validation that is to come comes with a later attempt.
    assert [step for step, _ in rows.new(ended=True)] == [2]
    logged.line(3)
    logged.line(4)
    assert [step for step, _ in rows.new(ended=True)] == [3]
    logged.line(3, attempt=2)
    logged.line(4, attempt=2)
    logged.line(4, attempt=2, validation_loss=3.0)
    [(step, row)] = rows.new(ended=True)
    assert (step, row["attempt"], row["validation_metrics/loss"]) == (4, 1, 3.0)


def test_a_step_that_is_done_again_is_not_sent_again(logged: Logged) -> None:
    for step in (1, 2, 3):
        logged.line(step)
    for step in (2, 3, 5, 6):
        logged.line(step, attempt=2)
    assert [(step, row["attempt"]) for step, row in logged.rows(sent=2).new(ended=True)] == [(3, 1), (5, 2), (6, 2)]


def test_a_line_that_was_cut_short_is_passed_over(logged: Logged) -> None:
    rows = logged.rows()
    logged.line(2)
    with logged.run.metrics_file.open("a") as file:
        file.write('{"step": 3, "ti')
    assert list(rows.new()) == []
    logged.line(3)
    logged.line(5)
    assert [step for step, _ in rows.new(ended=True)] == [2, 3, 5]


def test_the_newest_checkpoint_of_a_step(logged: Logged) -> None:
    rows = logged.rows()
    for step in (2, 3, 5):
        logged.line(step)
        append_json_line(logged.run.events_file, {"time": step + 0.5, "event": "save_committed", "step": step})
    assert [row["checkpoint"] for _, row in rows.new(ended=True)] == [0, 2, 3]
    assert rows.newest_checkpoint() == 5


@pytest.mark.parametrize(
    ("recipe", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
    ],
)
def test_modes(
    recipe: str, environment: dict[str, str], expected: str, interrupted: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/none")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plan = interrupted.run.plan()
    assert mode(dataclasses.replace(plan, wandb=plan.wandb | {"mode": recipe})) == expected
    off = dataclasses.replace(plan, torchtitan=plan.torchtitan | {"metrics.enable_wandb": False})
    assert mode(off) == "disabled"
