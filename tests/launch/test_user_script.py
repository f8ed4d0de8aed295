"""A user's script in the place of torchtitan's loop: what is refused before anything is made, and what a run keeps."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandLine
from titan_slurm.cli import options
from titan_slurm.cluster.state import status
from titan_slurm.errors import BadInputError
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
    assert (run.path / "history" / "training_script.0001" / "mine.py").read_text() == "print('first')\n"


def write_files(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"print('first {name}')\n")


def copied(run: RunDirectory) -> list[str]:
    """The files that a run has of its script and beside it."""
    files = (path for path in run.script_folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(run.script_folder)) for path in files)


def test_a_run_has_its_own_copy_of_the_modules_beside_the_script(script: Path) -> None:
    mine = ["helper.py", "package/__init__.py", "package/below/more.py"]
    others = [".hidden/a.py", "env/lib/a.py", "x/site-packages/a.py", "runs/old/training_script/a.py", "data.txt"]
    write_files(*mine, *others, "env/pyvenv.cfg")
    Path("circle").symlink_to(".")
    run = made(planned(script))
    assert copied(run) == [*mine[:1], "mine.py", *mine[1:]]
    before = locked_script(run)
    assert len(before) == 64
    # What is edited then is not the run's, and goes on as little as the script does.
    Path("helper.py").write_text("print('changed')\n")
    same = planned(None, resume=True)
    create.write_contents(run, same.plan, same.resolved, same.script)
    assert (run.script_folder / "helper.py").read_text() == "print('first helper.py')\n"
    assert locked_script(run) == before
    other = planned(script, resume=True)
    create.write_contents(run, other.plan, other.resolved, other.script)
    assert (run.script_folder / "helper.py").read_text() == "print('changed')\n"
    assert locked_script(run) != before


def test_a_rank_imports_what_was_beside_the_script_when_it_was_submitted(cli: CommandLine, script: Path) -> None:
    script.write_text("import helper, late\nraise SystemExit(f'{helper.WORD} {late.WORD}')\n")
    helper = script.with_name("helper.py")
    helper.write_text("WORD = 'first'\n")
    settings = ["slurm.tasks_per_node=1", "requeue.enabled=false", "wandb.enabled=false"]
    runs = Path("runs").absolute()
    run = made(options.prepare("llama3_debug", None, settings, "local", "mine", runs, script=script))
    # While it waits for its nodes, as it were. What was not there is found where it is.
    helper.write_text("raise RuntimeError('edited')\n")
    script.with_name("late.py").write_text("WORD = 'late'\n")
    assert cli("resume", "mine").code == 0
    deadline = time.monotonic() + 120
    while (now := status(run)).is_active and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "the script left with 'first late'" in now.reason


def locked_script(run: RunDirectory) -> str:
    """The hash of script and modules in a run's lock."""
    return str(json.loads(run.lock_file.read_text())["code"]["script"])


def test_of_too_many_modules_none_is_copied_and_that_is_said(script: Path) -> None:
    write_files(*(f"package/m{number}.py" for number in range(501)))
    prepared = planned(script)
    [note] = [note for note in prepared.notes if "modules" in note]
    assert note.startswith(f"the script's own modules are imported from {script.parent}, as they are then")
    assert copied(made(prepared)) == ["mine.py"]


def test_a_script_brings_its_own_model(script: Path) -> None:
    Path("own.toml").write_text("[training]\nseq_len = 64\nglobal_batch_size = 8\n[slurm]\ngpus_per_node = 0\n")
    assert planned(script, recipe="own.toml").plan.model == {"name": "script"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--script", "nowhere.py"), ("--script", "nowhere.py: cannot be read: No such file")),
        (("--script", "broken.py"), ("broken.py:2: is not Python: ",)),
        (
            ("--script", "mine.py", "--", "--hf_token", "hf_abc"),
            ("--script: --hf_token: holds credentials, which would be written into the run (leave them to the env",),
        ),
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


@pytest.mark.parametrize("arguments", [("--", "--lr", "3e-4"), ("--", "llama3_8b", "two words", "--", "-x")])
def test_what_follows_the_dashes_is_never_the_recipe(
    script: Path, fake_command: Callable[[str, str], Callable[[], list[str]]], arguments: tuple[str, ...]
) -> None:
    fake_command("sbatch", "echo Submitted batch job 7")
    command = ("submit", "--cluster", "slurm", "--name", "mine", "--script", script, *arguments)
    assert CommandLine()(*command).errors == ["no recipe was named (give a recipe, or set TORCHTITAN_CONFIG_PATH)"]
    done = CommandLine()(*command, env={"TORCHTITAN_CONFIG_PATH": "llama3_debug"})
    assert done.code == 0, done.err
    plan = RunDirectory(Path("runs/mine")).plan()
    assert plan.recipe == "llama3_debug"
    assert plan.script is not None
    assert plan.script["arguments"] == list(arguments[1:])


def test_a_script_needs_no_tokenizer_where_it_brings_its_own_data(script: Path) -> None:
    # Only torchtitan's loop can stream the recipe's c4.
    Path("c4.toml").write_text('[recipe]\nextends = "llama3_debug"\n[data]\ndataset = "c4"\ntokenizer = "nowhere"\n')
    assert planned(script, recipe="c4.toml").plan.script is not None
    Path("a.jsonl").touch()
    Path("text.toml").write_text('[recipe]\nextends = "c4.toml"\n[data]\ndataset = "text"\ndataset_path = "a.jsonl"\n')
    with pytest.raises(BadInputError, match="tokenizer: there is no folder "):
        planned(script, recipe="text.toml")
