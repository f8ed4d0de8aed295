"""What a run keeps of that which it is made of, and what it must not keep."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, CommandLine
from titan_slurm.launch import create, lock
from titan_slurm.launch.submit import Prepared
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.lock import code_hash

MakeRun = Callable[..., RunDirectory]
Prepare = Callable[..., Prepared]
KEY = "0123456789abcdef0123456789abcdef"


def locked(run: RunDirectory) -> dict[str, Any]:
    """A run's lock."""
    found: dict[str, Any] = json.loads(run.lock_file.read_text())
    return found


def made(prepared: Prepared) -> RunDirectory:
    """The run, on disk."""
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    return prepared.run


def go_on(prepared: Prepared) -> None:
    """What `submit --resume` writes."""
    create.write_contents(prepared.run, prepared.plan, prepared.resolved, prepared.script)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the package that is being run, which the test may edit."""
    folder = tmp_path / "checkout" / "titan_slurm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("one = 1\n")
    monkeypatch.setattr(lock, "PACKAGE", folder)
    return folder / "__init__.py"


def test_a_lock_says_what_a_run_is_made_of(
    make_run: MakeRun, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["titan-slurm", "submit", "llama3_debug"])
    found = locked(make_run("training.seed=7"))
    assert found["command"] == ["titan-slurm", "submit", "llama3_debug"]
    assert found["working_directory"] == str(clean_environment)
    assert (found["recipe"]["name"], found["recipe"]["version"], len(found["recipe"]["hash"])) == (
        "llama3_debug",
        "1.0.0",
        64,
    )
    assert found["seed"] == 7
    assert found["python"] == sys.version.split()[0]
    assert {"torch", "torchtitan", "titan-slurm"} <= found["packages"].keys()
    assert found["code"]["package"]["path"] == str(REPOSITORY / "titan_slurm")
    assert found["data"]["data"] == {"name": "python_docs", "path": None, "fingerprint": None}
    assert "trained" not in found


def test_the_same_recipe_has_the_same_hash(make_run: MakeRun) -> None:
    runs = [make_run(name="a"), make_run(name="b"), make_run("training.seed=7", name="c")]
    hashes = [locked(run)["recipe"]["hash"] for run in runs]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_has_the_code_that_submitted_it(make_run: MakeRun) -> None:
    run = make_run()
    assert locked(run)["code"]["hash"] == code_hash(REPOSITORY / "titan_slurm")
    assert code_hash(run.code_folder / "titan_slurm") == code_hash(REPOSITORY / "titan_slurm")
    assert not list(run.code_folder.rglob("__pycache__"))


def test_what_a_resume_replaces_is_kept(prepare: Prepare, package: Path) -> None:
    prepared = prepare("llama3_debug")
    run = made(prepared)
    go_on(prepared)
    # Nothing was edited: there is one copy of the code, and two locks.
    assert [path.name for path in (run.path / "history").iterdir()] == ["lock.0001.json"]
    before = locked(run)
    package.write_text("one = 2\n")
    go_on(prepared)
    copy = run.code_folder / "titan_slurm" / "__init__.py"
    assert copy.read_text() == "one = 2\n"
    kept = run.path / "history" / "code.0001" / "titan_slurm"
    assert (kept / "__init__.py").read_text() == "one = 1\n"
    assert json.loads((run.path / "history" / "lock.0002.json").read_text()) == before
    assert before["code"]["hash"] == code_hash(kept)


def test_what_a_run_was_begun_with_outlives_a_resume(prepare: Prepare) -> None:
    prepared = prepare("llama3_debug")
    run = made(prepared)
    trained = {"versions": {"torch": "2.13.0"}}
    run.lock_file.write_text(json.dumps(locked(run) | {"trained": trained}))
    go_on(prepared)
    assert locked(run)["trained"] == trained


def test_going_on_under_other_versions_is_said_at_submission(cli: CommandLine, make_run: MakeRun) -> None:
    run = make_run()
    again = ("submit", "llama3_debug", "--name", "mine", "--resume", "--dry-run", "--cluster", "slurm")
    assert " was " not in cli(*again).err
    found = locked(run)
    versions = {**found["packages"], "torch": "2.13.0"}
    run.lock_file.write_text(json.dumps(found | {"packages": versions}))
    assert f"note: torch was 2.13.0 in this run and is {found['packages']['torch']} here\n" in cli(*again).err


def test_own_data_is_fingerprinted(make_run: MakeRun, clean_environment: Path) -> None:
    (clean_environment / "text.txt").write_text("a text")
    run = make_run("data.dataset=text", "data.dataset_path=text.txt")
    data = locked(run)["data"]["data"]
    assert (data["name"], data["path"]) == ("text", str(clean_environment / "text.txt"))
    assert (data["fingerprint"]["files"], data["fingerprint"]["bytes"]) == (1, 6)
    (clean_environment / "text.txt").write_text("A text")
    [note] = [note for note in lock.changes(run) if "text.txt" in note]
    assert "is not what this run began with (data)" in note


def test_secrets_do_not_get_into_a_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MY_PASSWORD", "correct-horse")
    command = ["titan-slurm", "submit", "x", "--set", "a.api_key=battery", f"--set=b={KEY}", "correct-horse"]
    monkeypatch.setattr(sys, "argv", command)
    run = make_run()
    assert locked(run)["command"][3:] == ["--set", "a.api_key=[redacted]", "--set=b=[WANDB_API_KEY]", "[MY_PASSWORD]"]
    files = [path for path in run.path.rglob("*") if path.is_file() and not path.is_relative_to(run.code_folder)]
    for secret in (KEY, "correct-horse", "battery"):
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def git(folder: Path, *arguments: str | Path) -> None:
    subprocess.run(["git", "-c", "user.name=ada", "-c", "user.email=ada@host", "-C", folder, *arguments], check=True)


@pytest.fixture
def checkout(clean_environment: Path) -> Path:
    """The working directory as a repository of one commit, whose files then were changed. Its configuration and its
    files are the worst for a patch."""
    before = {"crlf.txt": b"one\r\n", "bytes.txt": b"\xe9\n", "blob": b"\0\1", ".env": b"A=1\n", "conf.yml": b"a: 1\n"}
    after = {
        "crlf.txt": b"two\r\n",
        "bytes.txt": b"\xe9\n\xff\n",
        "blob": b"\0\2",
        ".env": f"OPENAI_API_KEY={KEY}1\n".encode(),
    }
    for name, content in before.items():
        (clean_environment / name).write_bytes(content)
    git(clean_environment, "init", "--quiet")
    for setting in ("diff.noprefix", "diff.mnemonicPrefix", "color.ui"):
        git(clean_environment, "config", setting, "always" if setting == "color.ui" else "true")
    git(clean_environment, "config", "core.autocrlf", "false")
    git(clean_environment, "add", ".")
    git(clean_environment, "commit", "--quiet", "--message", "first")
    for name, content in after.items():
        (clean_environment / name).write_bytes(content)
    (clean_environment / "conf.yml").write_text(f"a: 1\nDB_PASSWORD: {KEY}2\nurl: https://x.y/z?sv=1&sig={KEY}3\n")
    return clean_environment


def test_what_is_not_committed_can_be_applied_again(make_run: MakeRun, checkout: Path, tmp_path: Path) -> None:
    run = make_run()
    about = locked(run)["code"]["working_directory"]
    assert (about["changed"], about["left_out"], "unanswered" in about) == (True, [".env"], False)
    patch = run.path / about["patch"]
    git(tmp_path, "clone", "--quiet", "-c", "core.autocrlf=false", checkout, "clone")
    git(tmp_path / "clone", "apply", "--check", patch)
    git(tmp_path / "clone", "apply", patch)
    for name in ("crlf.txt", "bytes.txt", "blob"):
        assert (tmp_path / "clone" / name).read_bytes() == (checkout / name).read_bytes()
    assert (tmp_path / "clone" / "conf.yml").read_text().splitlines()[1:] == [
        "DB_PASSWORD: [redacted]",
        "url: https://x.y/z?sv=1&sig=[redacted]",
    ]
    files = [path for path in run.path.rglob("*") if path.is_file() and not path.is_relative_to(run.code_folder)]
    for number in "123":
        assert not [path for path in files if f"{KEY}{number}".encode() in path.read_bytes()]


def test_of_many_untracked_files_some_are_named(make_run: MakeRun, checkout: Path) -> None:
    for number in range(120):
        (checkout / f"file{number}").touch()
    about = locked(make_run())["code"]["working_directory"]
    # The folder of runs is one more.
    assert (len(about["untracked"]), about["untracked_count"]) == (100, 121)


@pytest.mark.parametrize(
    ("script", "why"), [("echo fatal: no >&2; exit 128", "fatal: no"), ("exec sleep 60", "not within")]
)
def test_a_git_that_does_not_answer_has_not_said_that_nothing_changed(
    make_run: MakeRun,
    checkout: Path,
    fake_command: Callable[[str, str], Callable[[], list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    why: str,
) -> None:
    assert checkout.is_dir()
    monkeypatch.setattr(lock, "_GIT_TIMEOUT_S", 0.1 if "sleep" in script else 30)
    fake_command("git", script)
    about = locked(make_run())["code"]["working_directory"]
    assert about["changed"] is None
    assert about["unanswered"][0].startswith(f"git rev-parse: {why}")


def test_a_recipe_with_a_secret_is_refused(cli: CommandLine) -> None:
    given = ["wandb.entity=https://ada:pass@host", f"wandb.group=x{KEY}"]
    options = [word for setting in given for word in ("--set", setting)]
    outcome = cli("submit", "llama3_debug", "--cluster", "local", *options, env={"HF_TOKEN": KEY})
    assert outcome.code == 2
    hint = "leave them to the environment, or to ~/.netrc"
    what = "holds credentials, which would be written into the run"
    assert outcome.errors == [
        f"--set {given[0]}: wandb.entity: {what} ({hint})",
        f"--set {given[1]}: wandb.group: {what} ({hint})",
    ]
    assert not Path("runs").exists()


def test_a_run_that_pythonpath_cannot_hold_is_refused(cli: CommandLine) -> None:
    outcome = cli("render", "llama3_debug", "--runs-dir", "a:b", "--name", "mine")
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "has a ':', which PYTHONPATH cannot hold" in outcome.errors[0]
