"""The batch script: what a shell and sbatch make of it, and what a site may change."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from tests.conftest import CommandLine
from titan_slurm.launch import create
from titan_slurm.launch.executors import executor
from titan_slurm.launch.submit import Prepared
from titan_slurm.run.directory import RunDirectory

BASH = shutil.which("bash") or "bash"

# Each would make a file called `pwned` if a shell ever took it for more than text.
AWKWARD = (
    "it's",
    'a "quoted" word',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned #",
    "' ; touch pwned ; '",
    "a && touch pwned || touch pwned",
    "${IFS} $HOME ~ *",
    "--wrap=touch pwned",
    "-x",
    "a100|h100&gpu*2",
    "back\\slash",
    "# no comment",
    "ünïcode",
)


def directives(script: str) -> list[str]:
    """The words of the #SBATCH lines, as sbatch splits them: as a shell does, but that a backslash is an escape between
    single quotes too."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(re.sub(r"\\(.)", r"\1", line))]


def template(text: str, name: str = "base.sbatch.j2") -> Path:
    """A template of the site's own."""
    path = Path("templates", name).absolute()
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("cluster", ["slurm", "local"])
@pytest.mark.parametrize("recipe", ["llama3_debug", "llama3_8b"])
def test_bash_accepts_the_script_of_every_recipe(cli: CommandLine, recipe: str, cluster: str) -> None:
    Path("tokenizer").mkdir()
    # How many GPUs this machine has must not matter here.
    settings = ("data.tokenizer=tokenizer", "slurm.gpus_per_node=0", "slurm.tasks_per_node=2")
    given = [word for setting in settings for word in ("--set", setting)]
    outcome = cli("render", recipe, "--cluster", cluster, *given)
    assert outcome.code == 0, outcome.err
    checked = subprocess.run([BASH, "-n"], input=outcome.out, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_what_the_recipe_asks_of_slurm(cli: CommandLine) -> None:
    Path("tokenizer").mkdir()
    more = ["data.tokenizer=tokenizer", "slurm.partition=gpu", "slurm.account=lab", "slurm.mem=500G"]
    given = [word for setting in more for word in ("--set", setting)]
    outcome = cli("render", "llama3_8b", "--nodes", "4", "--name", "mine", "--runs-dir", "/scratch/runs", *given)
    assert outcome.code == 0, outcome.err
    words = directives(outcome.out)
    comment = words.pop(1)
    assert comment.startswith("--comment=titan-slurm mine-")
    assert words == [
        "--job-name=mine",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--mem=500G",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--account=lab",
        "--exclusive",
        "--requeue",
        "--signal=USR2@600",
        "--output=/scratch/runs/mine/job.log",
        "--open-mode=append",
    ]
    # Everything that sbatch reads stands before the first command.
    lines = outcome.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert all(line.startswith("#SBATCH ") for line in lines[1 : len(words) + 2])


def test_a_run_that_must_not_be_requeued(prepare: Callable[..., Prepared]) -> None:
    words = directives(prepare("llama3_debug", "requeue.enabled=false").script)
    assert "--no-requeue" in words
    assert "--requeue" not in words


def test_the_same_plan_gives_the_same_script(prepare: Callable[..., Prepared]) -> None:
    prepared = prepare("llama3_debug")
    assert executor(prepared.plan, prepared.run).script() == prepared.script


def test_two_runs_of_one_name_differ_in_their_ids_alone(cli: CommandLine) -> None:
    first, second = (cli("render", "llama3_debug", "--name", "mine").out.splitlines() for _ in range(2))
    different = [one for one, other in zip(first, second, strict=True) if one != other]
    assert [line.partition("=")[0] for line in different] == ["#SBATCH --comment"]


def test_rendering_needs_no_slurm_and_makes_nothing(cli: CommandLine) -> None:
    outcome = cli.process("render", "llama3_debug", env={"PATH": "/nonexistent"})
    assert outcome.code == 0, outcome.err
    assert "srun --kill-on-bad-exit=1" in outcome.out
    for cluster in ("slurm", "local"):
        assert cli("render", "llama3_debug", "--cluster", cluster).code == 0
        assert cli("submit", "llama3_debug", "--dry-run", "--cluster", cluster).code == 0
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("field", ["partition", "constraint"])
def test_an_awkward_directive_stays_one_word(prepare: Callable[..., Prepared], field: str, text: str) -> None:
    # In a recipe, where a value cannot be taken for anything but text.
    Path("mine.toml").write_text(tomli_w.dumps({"recipe": {"extends": "llama3_debug"}, "slurm": {field: text}}))
    script = prepare("mine.toml").script
    assert f"--{field}={text}" in directives(script)
    assert directives(script)[-1] == "--open-mode=append"


def test_awkward_paths_execute_nothing(
    prepare: Callable[..., Prepared], clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = clean_environment / " ".join(text.replace("/", "") for text in AWKWARD)
    prepared = prepare("llama3_debug", f"wandb.project={AWKWARD[2]}")
    moved = RunDirectory(folder / "mine")
    script = executor(prepared.plan, moved).script()
    create.create(moved, prepared.plan, prepared.resolved, script)
    before = set(clean_environment.iterdir())

    # The real script, on a machine without srun: it begins an attempt, fails to start the ranks, and says so.
    monkeypatch.setenv("PATH", "/nonexistent")
    done = subprocess.run([BASH, moved.script_file], capture_output=True, text=True, env=dict(os.environ))

    assert done.returncode == 127
    [attempt] = moved.attempts()
    assert attempt.path.parent == folder / "mine" / "attempts"
    verdict = attempt.verdict()
    assert verdict is not None
    assert (verdict["verdict"], verdict["reason"]) == ("crashed", "a rank left with exit code 127 and without an error")
    assert set(clean_environment.iterdir()) == before
    assert not list(clean_environment.rglob("pwned"))


def test_a_path_of_two_lines_is_refused(cli: CommandLine) -> None:
    outcome = cli("render", "llama3_debug", "--runs-dir", "a\nb")
    assert outcome.code == 2
    [error] = outcome.errors
    assert "has a control character, which a batch script cannot hold" in error
    assert outcome.out == ""


@pytest.mark.parametrize("character", [":", "%"])
def test_a_path_in_which_a_job_would_not_find_its_files_is_refused(cli: CommandLine, character: str) -> None:
    outcome = cli("submit", "llama3_debug", "--runs-dir", f"/a{character}jobs", "--name", "mine", "--cluster", "slurm")
    assert outcome.code == 2
    [error] = outcome.errors
    assert error.startswith(f"--runs-dir: /a{character}jobs/mine has a '{character}', ")


def test_a_site_adds_to_the_script_what_it_needs(cli: CommandLine) -> None:
    path = template(
        '{% extends "titan_slurm/base.sbatch.j2" %}\n'
        "{% block environment %}\nmodule load cuda/13.0\nexport WHERE={{ run | sh }}\n{% endblock %}\n"
    )
    outcome = cli("render", "llama3_debug", "--name", "mine")
    assert f"note: template: your own, {path}\n" in outcome.err
    lines = outcome.out.splitlines()
    # After the directives, before the first command.
    load = lines.index("module load cuda/13.0")
    assert any("titan_slurm.run begin" in line for line in lines[load:])
    assert not any("titan_slurm.run begin" in line for line in lines[:load])
    assert not any(line.startswith("#SBATCH") for line in lines[load:])
    assert f"export WHERE={Path('runs/mine').absolute()}" in lines
    assert any(line.startswith("srun ") for line in lines)


def test_a_site_adds_a_directive_and_an_option_of_srun(cli: CommandLine) -> None:
    template(
        '{% extends "titan_slurm/base.sbatch.j2" %}\n'
        "{% set srun = ['--mpi=none', '--container-image=a b'] %}\n"
        "{% block directives %}\n{{ super() }}\n#SBATCH --switches=1\n{% endblock %}\n"
    )
    outcome = cli("render", "llama3_debug")
    assert outcome.code == 0, outcome.err
    assert directives(outcome.out)[-1] == "--switches=1"
    assert directives(outcome.out)[0].startswith("--job-name=")
    [launch] = [line for line in outcome.out.splitlines() if line.startswith("srun ")]
    assert shlex.split(launch.rstrip("\\"))[-2:] == ["--mpi=none", "--container-image=a b"]


def test_the_users_template_in_the_home_folder(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".config" / "titan-slurm" / "templates"
    folder.mkdir(parents=True)
    (folder / "base.sbatch.j2").write_text('{% extends "titan_slurm/base.sbatch.j2" %}\n')
    assert f"note: template: your own, {folder}/base.sbatch.j2\n" in cli("render", "llama3_debug").err


def test_a_site_with_a_base_of_its_own_leaves_local_runs_alone(cli: CommandLine) -> None:
    template("#!/bin/bash\n# not for local runs\n")
    assert "not for local runs" in cli("render", "llama3_debug", "--cluster", "slurm").out
    assert "not for local runs" not in cli("render", "llama3_debug", "--cluster", "local").out


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("#!/bin/bash\n\n#SBATCH -p {{ partition }}\n", 3, "'partition' is undefined"),
        (
            '{% extends "titan_slurm/base.sbatch.j2" %}\n{% block launch %}\n\n{{ plan.nothing }}\n{% endblock %}\n',
            4,
            "nothing",
        ),
        ("#!/bin/bash\n{% if plan %}\n", 2, "endif"),
        ("#!/bin/bash\n\n{{ name | shell }}\n", 3, "No filter named 'shell'"),
        ("#!/bin/bash\n{{ 1 // 0 }}\n", 2, "by zero"),
        ("#!/bin/bash\n{{ name + 1 }}\n", 2, "str"),
        ("#!/bin/bash\n\n{{ ('a' ~ '\\n') | sh }}\n", 3, "control character"),
    ],
    ids=["undefined", "undefined_in_a_block", "unclosed", "unknown_filter", "division", "types", "control"],
)
def test_a_mistake_in_a_template_names_its_line(cli: CommandLine, text: str, line: int, what: str) -> None:
    path = template(text)
    outcome = cli("submit", "llama3_debug", "--cluster", "slurm", "--name", "mine")
    assert outcome.code == 2
    [error] = outcome.errors
    assert error.startswith(f"{path}:{line}: ")
    assert what in error
    assert not Path("runs").exists()


def test_a_template_that_extends_nothing(cli: CommandLine) -> None:
    path = template('{% extends "titan_slurm/bas.sbatch.j2" %}\n')
    outcome = cli("render", "llama3_debug")
    assert outcome.code == 2
    assert outcome.errors == [f"{path}:1: there is no template 'titan_slurm/bas.sbatch.j2' to extend or include"]


@pytest.mark.parametrize("verb", ["submit", "validate", "render"])
def test_a_template_that_makes_nothing(cli: CommandLine, verb: str) -> None:
    path = template("")
    outcome = cli(verb, "llama3_debug", "--cluster", "slurm")
    assert (outcome.code, outcome.out) == (2, "")
    [error] = outcome.errors
    assert error.startswith(f"{path}:1: the template makes an empty script (")
    assert not Path("runs").exists()
