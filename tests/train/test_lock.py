"""What a run is made of and what it says of itself, in real trainings: submitted from a checkout that is edited while
the job waits, made again from its lock, and gone on with under other versions."""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.train.conftest import LocalRun
from titan_slurm.run import metrics
from titan_slurm.run.files import read_json, write_json

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "SITE_PASSWORD": "correct-horse-battery",
}
GIT = ("git", "-c", "user.name=ada", "-c", "user.email=ada@host")


def git(folder: Path, *arguments: str) -> None:
    subprocess.run([*GIT, "-C", folder, *arguments], check=True, capture_output=True)


def make_checkout(folder: Path) -> Path:
    """A clone with one commit and a change that is not committed, which has a secret in it."""
    for name in ("titan_slurm", "recipes", "templates"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    git(folder, "remote", "add", "origin", "https://ada:correct-horse@host.org/x.git")
    with (folder / "recipes" / "llama3_debug.toml").open("a") as recipe:
        recipe.write(f"# {SECRETS['HF_TOKEN']}\n")
    return folder


def make_gate(folder: Path) -> Callable[[], None]:
    """A `bash` in that folder which waits: a job that is started with it waits for its nodes, as it were. Returns what
    lets it begin."""
    folder.mkdir()
    bash, gate = shutil.which("bash"), folder / "open"
    (folder / "bash").write_text(f'#!{bash}\nwhile [ ! -e {gate} ]; do sleep 0.1; done\nexec {bash} "$@"\n')
    (folder / "bash").chmod(0o755)
    return gate.touch


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LocalRun:
    """A run that was submitted from a checkout, in which nothing works any more by the time its job starts."""
    folder = tmp_path_factory.mktemp("lock")
    checkout = make_checkout(folder / "checkout")
    open_gate = make_gate(folder / "bin")
    # The folder of runs is in the checkout, and so is where the job starts: the worst place.
    settings = ("training.max_steps=4", "checkpointing.save_interval=2", "checkpointing.async_mode=async")
    run = LocalRun(checkout / "mine", *settings, "wandb.enabled=true", "wandb.mode=offline")
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run.environment = {**SECRETS, "PYTHONPATH": str(checkout), "PATH": path}
    run.start()
    for name in ("__init__.py", "run/leave.py", "train/rank.py", "train/trainer.py"):
        (checkout / "titan_slurm" / name).write_text("raise RuntimeError('this was edited after the submission')\n")
    open_gate()
    # From here on the commands are those of the clone.
    run.environment = {"PYTHONSAFEPATH": "1"}
    ended = run.wait()
    assert ended.state == "completed", f"{ended}\n{(run.run.path / 'job.log').read_text()[-3000:]}"
    return run


def locked(run: LocalRun) -> dict[str, Any]:
    """Its lock."""
    return read_json(run.run.lock_file) or {}


def test_what_runs_is_what_was_submitted(trained: LocalRun) -> None:
    checkout = trained.run.path.parent
    found = locked(trained)
    assert found["code"]["package"]["path"] == str(checkout / "titan_slurm")
    assert "edited" in (checkout / "titan_slurm" / "__init__.py").read_text()
    environment = trained.run.attempts()[0].environment()
    assert environment["code"] == str(trained.run.path / "code" / "titan_slurm")
    assert environment["differs"] == {}
    # And what was not committed can be had again, as far as it is nobody's secret.
    commit = subprocess.run([*GIT, "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = found["code"]["package"]
    assert (about["commit"], about["changed"]) == (commit, True)
    assert about["remote"] == "https://[redacted]@host.org/x.git"
    assert "+# [HF_TOKEN]" in (trained.run.path / about["patch"]).read_text()


def test_the_first_attempt_completes_the_lock(trained: LocalRun) -> None:
    found = locked(trained)["trained"]
    assert found["attempt"] == 1
    assert found["versions"]["torch"] == found["packages"]["torch"]
    assert found["versions"]["titan-slurm"].startswith("0.1.0+")
    assert len(found["processors"]) == 1
    assert {name: each["path"] for name, each in found["assets"].items()} == {
        "tokens": "assets/tokens",
        "tokenizer": "assets/tokenizer",
    }


def test_no_file_of_a_run_holds_a_secret(trained: LocalRun) -> None:
    files = [path for path in trained.run.path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    for secret in (*SECRETS.values(), "correct-horse"):
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_events_tell_the_whole_life_of_an_attempt(trained: LocalRun) -> None:
    told = [each for each in trained.run.events() if each["attempt"] in (None, 1)]
    assert [each["event"] for each in told] == [
        "queued",
        "started",
        "rank_started",
        "imports_done",
        "rendezvous",
        "data_ready",
        "model_built",
        "checkpoint_loaded",
        "first_step",
        "save_begin",
        "save_staged",
        "save_committed",
        # The last one waits until it is done.
        "save_begin",
        "save_committed",
        "finished",
        "verdict",
    ]
    times = [each["time"] for each in told]
    assert times == sorted(times)
    steps = [(each["event"], each["step"]) for each in told if "step" in each]
    assert steps == [
        ("checkpoint_loaded", 0),
        ("first_step", 1),
        ("save_begin", 2),
        ("save_staged", 2),
        ("save_committed", 2),
        ("save_begin", 4),
        ("save_committed", 4),
        ("finished", 4),
    ]
    staged = next(each for each in told if each["event"] == "save_staged")
    assert 0 < staged["seconds_blocked"] <= staged["seconds"]
    first, last = (each for each in told if each["event"] == "save_committed")
    assert first["bytes"] > 2**20
    assert first["seconds_blocked"] == staged["seconds_blocked"]
    assert 0 < last["seconds"] <= last["seconds_blocked"]


def test_metrics_have_what_there_is_on_a_cpu(trained: LocalRun) -> None:
    lines = [line for line in trained.run.metrics() if line["attempt"] == 1]
    assert [(line["step"], line["replayed"]) for line in lines] == [(1, False), (2, False), (3, False), (4, False)]
    for line in lines:
        assert line["step_seconds"] > line["data_seconds"] > 0
        assert not {"mfu", "memory_active_gib", "memory_reserved_gib"} & line.keys()
        assert line["max_loss"] >= line["loss"]
    # What the ranks said at one logged step is read at the next.
    assert "ranks" not in lines[0]
    for before, line in itertools.pairwise(lines):
        ranks = line["ranks"]
        assert ranks["step"] == before["step"]
        for name in ("step_seconds", "data_seconds", "optimizer_seconds"):
            assert 0 < ranks[name]["min"] <= ranks[name]["max"]
            assert {ranks[name]["min_rank"], ranks[name]["max_rank"]} <= {0, 1}
        assert ranks["step_seconds"]["min"] - 1e-6 <= before["step_seconds"] <= ranks["step_seconds"]["max"] + 1e-6


def test_what_is_compiled_stays_with_the_run(trained: LocalRun) -> None:
    variables = trained.run.attempts()[0].environment()["variables"]
    folder = trained.run.path / "cache"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(variables[name]).is_relative_to(folder)
        assert Path(variables[name]).parent.name.startswith("1-nodes-")


def test_a_run_is_made_again_to_the_bit(trained: LocalRun, tmp_path: Path) -> None:
    again = LocalRun(tmp_path / "again")
    # By the folder of a checkpoint, which knows whose it is.
    checkpoint = trained.checkpoints / "step-4"
    about = json.loads(again.titan_slurm("reproduce", str(checkpoint), "--name", "again", "--json"))
    assert about["differences"] == []
    assert about["reproduces"] == str(trained.run.path)
    ended = again.wait()
    assert ended.state == "completed", f"{ended}\n{again.log()[-3000:]}"
    assert again.losses() == trained.losses(attempt=1)
    assert again.steps == [2, 4]
    assert (locked(again)["code"], locked(again)["seed"]) == (locked(trained)["code"], locked(trained)["seed"])
    tokens = [run.run.path / "assets" / "tokens" / "tokens.bin" for run in (trained, again)]
    assert tokens[0].samefile(tokens[1])
    found = json.loads(again.titan_slurm("compare", str(trained.run.path), "again", "--json"))
    assert (found["recipe"], found["environment"], found["first_difference"]) == ({}, {}, None)
    assert len(found["steps"]) == 4


def test_going_on_under_other_versions(trained: LocalRun) -> None:
    # The last one here: the run is another afterwards.
    before = trained.losses(attempt=1)
    write_json(trained.run.lock_file, json.loads(json.dumps(locked(trained)).replace('"torch": "2.', '"torch": "1.')))
    # Of the checkpoints one is left, of a step before the last that was logged.
    (trained.checkpoints / "step-4" / "commit.json").unlink()

    trained.start("training.max_steps=6", "requeue.enabled=true", "requeue.strict=true")
    ended = trained.wait()
    assert (ended.state, ended.verdict, ended.attempts) == ("failed", "crashed", 2)
    assert "OtherVersionsError: torch was 1." in ended.reason
    assert "[requeue] strict = true" in ended.reason
    assert "comes again at every start" in ended.reason

    trained.train("requeue.strict=false")
    third = trained.run.attempts()[2]
    was, now = third.environment()["differs"]["torch"]
    assert was == now.replace("2.", "1.", 1)
    assert f"Not as when this run began: torch was {was} and is {now}." in trained.log()
    # The steps that were done again say so, and there is one curve.
    lines = [line for line in trained.run.metrics() if line["attempt"] == 3]
    assert [(line["step"], line["replayed"]) for line in lines] == [(3, True), (4, True), (5, False), (6, False)]
    curve = metrics.curve(trained.run.metrics_file)
    assert [(line["step"], line["attempt"]) for line in curve] == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 3)]
    assert {line["step"]: line["loss"] for line in curve[:4]} == before
    assert len(list((trained.run.path / "history").glob("lock.*.json"))) == 2
