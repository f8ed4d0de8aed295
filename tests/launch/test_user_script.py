"""A user's script in the place of torchtitan's loop: what is refused before anything is made, and what a run keeps."""

from pathlib import Path

import pytest

from tests.conftest import CommandLine
from titan_slurm.cli import options
from titan_slurm.launch import create
from titan_slurm.launch.submit import Prepared
from titan_slurm.run.directory import RunDirectory


@pytest.fixture
def script(clean_environment: Path) -> Path:
    file = clean_environment / "mine.py"
    file.write_text("print('first')\n")
    return file


def planned(script: Path | None, *arguments: str, resume: bool = False, recipe: str = "llama3_debug") -> Prepared:
    runs = Path("runs").absolute()
    return options.prepare(recipe, None, [], "slurm", "mine", runs, resume=resume, script=script, arguments=arguments)


def made(prepared: Prepared) -> RunDirectory:
    prepared.run.path.parent.mkdir(exist_ok=True)
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    return prepared.run


def test_a_run_has_its_own_copy_of_script_and_arguments(script: Path) -> None:
    run = made(planned(script, "--model", "two words"))
    script.write_text("print('changed')\n")
    plan = run.plan()
    assert plan.life == "titan_slurm.accelerate.rank"
    assert plan.script is not None
    assert plan.script["arguments"] == ["--model", "two words"]
    assert (run.path / plan.script["path"]).read_text() == "print('first')\n"


def test_a_run_goes_on_with_its_own_script_or_with_another(script: Path) -> None:
    run = made(planned(script, "--steps", "5"))
    script.write_text("print('second')\n")
    same = planned(None, resume=True)
    assert same.plan.script is not None
    assert same.plan.script["arguments"] == ["--steps", "5"]
    create.write_contents(run, same.plan, same.resolved, same.script)
    copy = run.path / same.plan.script["path"]
    assert copy.read_text() == "print('first')\n"
    other = planned(script, resume=True)
    create.write_contents(run, other.plan, other.resolved, other.script)
    assert copy.read_text() == "print('second')\n"
    assert (run.path / "history" / "mine.0001.py").read_text() == "print('first')\n"


def test_a_script_brings_its_own_model(script: Path) -> None:
    Path("own.toml").write_text("[training]\nseq_len = 64\nglobal_batch_size = 8\n[slurm]\ngpus_per_node = 0\n")
    assert planned(script, recipe="own.toml").plan.model == {"name": "script"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--script", "nowhere.py"), ("--script", "nowhere.py: cannot be read: No such file")),
        (("--script", "broken.py"), ("broken.py:2: is not Python: ",)),
        (("--array", "--script", "mine.py", "--set", "training.seed=1,2"), ("--script: not with --array",)),
        (("--", "--model", "gemma"), ("--model gemma: arguments without a script to take them",)),
        (
            ("--script", "mine.py", "--nodes", "2", "--set", "parallelism.pipeline_parallel=2"),
            ("parallelism.pipeline_parallel: Accelerate cannot do 2", "titan-slurm submit, without --script"),
        ),
    ],
)
def test_what_is_refused(clean_environment: Path, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    Path("mine.py").write_text("pass\n")
    Path("broken.py").write_text("pass\nfor\n")
    done = CommandLine()("submit", "llama3_debug", "--cluster", "slurm", *arguments)
    assert done.code == 2
    assert len(done.errors) == 1
    for text in says:
        assert text in done.errors[0]
    assert not (clean_environment / "runs").exists()
