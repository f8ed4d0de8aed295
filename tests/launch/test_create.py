"""A run directory is there whole or not at all."""

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from tests.conftest import CommandLine
from titan_slurm.launch import create
from titan_slurm.launch.submit import Prepared


def without_id(script: str) -> list[str]:
    """The script without the one line that is another for every run."""
    return [line for line in script.splitlines() if not line.startswith("#SBATCH --comment=")]


def test_a_run_is_complete(cli: CommandLine, prepare: Callable[..., Prepared]) -> None:
    rendered = cli("render", "llama3_debug", "--name", "mine", "--set", "training.max_steps=3").out

    prepared = prepare("llama3_debug", "training.max_steps=3")
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)

    run = Path("runs/mine")
    # And `patches`, where the clone has changes that are not committed.
    names = {path.name for path in run.iterdir()} - {"patches"}
    assert names == {"code", "job.sh", "lock.json", "plan.json", "recipe.toml"}
    assert [path.name for path in run.parent.iterdir()] == ["mine"]
    assert without_id((run / "job.sh").read_text()) == without_id(rendered)
    assert (run / "job.sh").read_text() == prepared.script
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["name"], plan["recipe"], plan["cluster"]) == ("mine", "llama3_debug", "slurm")
    assert plan["torchtitan"]["training.steps"] == 3
    assert plan["torchtitan"]["checkpoint.folder"] == str(run.absolute() / "checkpoints")
    recipe = tomli.loads((run / "recipe.toml").read_text())
    assert recipe["training"]["max_steps"] == 3
    assert "extends" not in recipe["recipe"]


def test_a_run_that_was_only_created_says_so(cli: CommandLine, prepare: Callable[..., Prepared]) -> None:
    prepared = prepare("llama3_debug")
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    status = json.loads(cli("status", "mine", "--json").out)
    assert (status["name"], status["state"], status["job_id"], status["attempts"]) == ("mine", "created", None, 0)
    assert (status["step"], status["max_steps"], status["loss"], status["verdict"]) == (0, 60, None, None)


def test_a_folder_of_checkpoints_belongs_to_one_run(prepare: Callable[..., Prepared], tmp_path: Path) -> None:
    shared = f"checkpointing.save_dir={tmp_path}/shared"
    folders = {prepare("llama3_debug", shared, name=name).plan.torchtitan["checkpoint.folder"] for name in ("a", "b")}
    assert folders == {f"{tmp_path}/shared/a", f"{tmp_path}/shared/b"}
    assert not (tmp_path / "shared").exists()


CREATE = """
import sys
from titan_slurm.cli.options import prepare
from titan_slurm.errors import BadInputError
from titan_slurm.launch.create import create

prepared = prepare("llama3_debug", None, None, "slurm", "mine", None)
print("ready", flush=True)
sys.stdin.readline()
try:
    create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
except BadInputError as error:
    sys.exit(str(error))
print(prepared.plan.run_id)
"""


def test_of_two_that_make_the_same_run_at_once_one_wins(clean_environment: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    # Both have found the name free by now.
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate() for process in started]

    run = clean_environment / "runs" / "mine"
    assert sorted(process.returncode for process in started) == [0, 1]
    [winner] = [out.strip() for out, _ in said if out]
    [loser] = [error for _, error in said if error]
    assert loser.startswith(f"--name: there is a run mine already: {run}")
    assert json.loads((run / "plan.json").read_text())["run_id"] == winner
    assert [path.name for path in run.parent.iterdir()] == ["mine"]


def test_what_a_kill_left_behind_is_no_run_and_in_nobodys_way(
    cli: CommandLine, prepare: Callable[..., Prepared]
) -> None:
    left = Path("runs/.mine.4711")
    left.mkdir(parents=True)
    (left / "plan.json").write_text("{}")

    assert cli("status").out == f"no runs in {Path('runs').absolute()}\n"
    assert json.loads(cli("status", "--json").out) == []

    prepared = prepare("llama3_debug")
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    assert [status["name"] for status in json.loads(cli("status", "--json").out)] == ["mine"]


def test_a_run_without_a_name_gets_a_free_one(cli: CommandLine) -> None:
    Path("-ö 7.toml").write_text('[recipe]\nextends = "llama3_debug"\n')
    rendered = cli("render", "./-ö 7.toml")
    assert rendered.code == 0, rendered.err
    [name] = [line for line in rendered.out.splitlines() if line.startswith("#SBATCH --job-name=")]
    assert name.startswith("#SBATCH --job-name=7-2")


def test_without_a_name_in_the_environment_the_user_has_the_systems(
    prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("USER", raising=False)
    prepared = prepare("llama3_debug")
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    assert json.loads(prepared.run.lock_file.read_text())["user"] == pwd.getpwuid(os.getuid()).pw_name
