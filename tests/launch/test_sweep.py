"""Many runs as one job array: which settings each has, and what is refused before anything is made."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandLine
from titan_slurm.errors import BadInputError
from titan_slurm.launch.sweep import settings_of_runs

FakeCommand = Callable[[str, str], Callable[[], list[str]]]


def planned(settings: list[str], file: Path | None = None) -> list[dict[str, object]]:
    return [{".".join(one.key): one.value for one in run} for run in settings_of_runs(settings, file)]


def test_every_combination_is_a_run_and_the_last_key_changes_fastest() -> None:
    found = planned(["training.max_steps=3,4", "model.name=llama3", "optimizer.lr=1e-3,2e-3"])
    assert [(run["training.max_steps"], run["optimizer.lr"]) for run in found] == [
        (3, 1e-3), (3, 2e-3), (4, 1e-3), (4, 2e-3),
    ]  # fmt: skip
    assert {run["model.name"] for run in found} == {"llama3"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("wandb.tags=['a', 'b'],[]", [["a", "b"], []]),
        ('wandb.tags=["a,b"],["c"]', [["a,b"], ["c"]]),
        ('data.dataset="a,b",c', ["a,b", "c"]),
        (r'data.dataset="a\",b",c', ['a",b', "c"]),
        ("model.config={a = 1, b = 2},{}", [{"a": 1, "b": 2}, {}]),
        ("slurm.time=00:10:00, 00:20:00", ["00:10:00", "00:20:00"]),
        ("training.deterministic=true,false", [True, False]),
    ],
)
def test_a_comma_in_brackets_or_quotes_separates_nothing(text: str, values: list[object]) -> None:
    key = text.partition("=")[0]
    assert [run[key] for run in planned([text])] == values


def test_a_list_in_a_file_is_combined_with_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "runs.txt"
    file.write_text(
        "# rate and decay together\n"
        "optimizer.lr=1e-3 optimizer.weight_decay=0.1  # the usual\n"
        "\n"
        'optimizer.lr=3e-3 wandb.tags=\'["a", "b"]\'\n'
    )
    found = planned(["training.max_steps=3,4"], file)
    assert found == [
        {"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.1, "training.max_steps": 3},
        {"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.1, "training.max_steps": 4},
        {"optimizer.lr": 3e-3, "wandb.tags": ["a", "b"], "training.max_steps": 3},
        {"optimizer.lr": 3e-3, "wandb.tags": ["a", "b"], "training.max_steps": 4},
    ]


def test_everything_wrong_with_the_settings_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "runs.txt"
    file.write_text("optimizer.lr=1e-3\nlr=3\noptimizer.lr=1 optimizer.lr=2\noptimizer.lr='1\n")
    with pytest.raises(BadInputError) as caught:
        settings_of_runs(["training.max_steps=3,,4", "seed=3", "training.max_steps=1,2"], file)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{file}:2: is not of the form section.key=value (e.g. --set training.max_steps=100)",
        f"{file}:3: optimizer.lr is set twice",
        f"{file}:4: No closing quotation",
        "--set training.max_steps=3,,4: one of the values is empty (a comma stands between two of them)",
        "--set seed=3: is not of the form section.key=value (e.g. --set training.max_steps=100)",
    ]


def array(cli: CommandLine, *more: str) -> list[str]:
    """What is wrong with an array of two runs with these options; nothing may have been made."""
    given = ("--name", "grid", "--array", "--set", "training.max_steps=3,4", "--cluster", "slurm")
    outcome = cli("submit", "llama3_debug", *given, *more)
    assert outcome.code == 2
    assert not Path("runs").exists()
    assert "Traceback" not in outcome.err
    return outcome.errors


def test_what_an_array_cannot_be(cli: CommandLine) -> None:
    assert array(cli, "--cluster", "local") == [
        "--array: is a job array of Slurm's, and these runs are to be on this machine"
    ]
    assert array(cli, "--set", "training.max_steps=5") == [
        "--array: training.max_steps is set twice (give all its values at once)"
    ]
    assert array(cli, "--resume", "--follow", "--chain", "2") == [
        "--resume: not with --array (go on with one of its runs, by that run's --name)",
        "--follow: not with --array (titan-slurm status, or logs of one of its runs)",
        "--chain: not with --array (one of them at a time)",
    ]
    assert array(cli, "--set", "slurm.time=00:10:00,00:20:00") == [
        "--array: sbatch's time is 00:10:00 for grid-0 and 00:20:00 for grid-1 "
        "(all tasks of an array ask for the same; submit an array for each)"
    ]
    assert array(cli, "--name", "7") == ["--name: '7' would be taken for a job id (add a letter)"]
    outcome = cli("submit", "llama3_debug", "--array-limit", "3", "--cluster", "slurm")
    assert outcome.errors == ["--array-limit: has no meaning without --array"]
    outcome = cli("submit", "llama3_debug", "--array", "--cluster", "slurm")
    assert "there is only one run" in outcome.errors[0]
    outcome = cli("submit", "llama3_debug", "--array-file", "nowhere", "--cluster", "slurm")
    assert outcome.errors == ["--array-file nowhere: cannot be read: No such file or directory"]


def test_a_mistake_in_any_run_is_said_once(cli: CommandLine) -> None:
    assert array(cli, "--set", "training.batch_size=4,-4", "--set", "optimizer.lrr=1") == [
        "--set optimizer.lrr=1: [optimizer] has no field 'lrr' (did you mean 'lr'?)",
        "--set training.batch_size=-4: training.batch_size = -4: must be greater than 0",
    ]


ACCEPTS = """case "$*" in *--test-only*) exit 1;; *) echo Submitted batch job 4711;; esac"""


def submitted(cli: CommandLine, *more: str) -> Path:
    """The folder of runs after an array of two has been submitted to an sbatch that accepts everything."""
    given = ("--name", "grid", "--array", "--set", "training.max_steps=3,4", "--set", "optimizer.lr=1e-3,2e-3")
    outcome = cli("submit", "llama3_debug", *given, *more, "--cluster", "slurm")
    assert outcome.code == 0, outcome.err
    return Path("runs").absolute()


def test_each_run_is_a_run_like_any_other(cli: CommandLine, fake_command: FakeCommand) -> None:
    calls = fake_command("sbatch", ACCEPTS)
    runs = submitted(cli, "--array-limit", "2")
    assert [call for call in calls() if "--test-only" not in call] == [f"{runs}/grid/job.sh"]
    names = [f"grid-{number}" for number in range(4)]
    assert sorted(path.name for path in runs.iterdir()) == ["grid", *names]
    plans = [json.loads((runs / name / "plan.json").read_text()) for name in names]
    assert [plan["torchtitan"]["training.steps"] for plan in plans] == [3, 3, 4, 4]
    assert [plan["name"] for plan in plans] == names
    assert len({plan["run_id"] for plan in plans}) == 4
    assert {plan["wandb"]["group"] for plan in plans} == {"grid"}
    for number, name in enumerate(names):
        [job] = [json.loads(line) for line in (runs / name / "jobs.jsonl").read_text().splitlines()]
        assert job["job_id"] == f"4711_{number}"
        assert not (runs / name / "submission.json").exists()
        assert f"titan_slurm.run begin {runs}/{name}" in (runs / name / "job.sh").read_text()
    # The code is one copy, whatever becomes of any of the runs.
    assert (runs / "grid-3" / "code" / "titan_slurm" / "__init__.py").stat().st_nlink == 4
    about = json.loads((runs / "grid" / "sweep.json").read_text())
    assert (about["job_id"], about["at_once"]) == ("4711", 2)
    assert about["runs"][1] == {"run": "grid-1", "settings": {"training.max_steps": 3, "optimizer.lr": 0.002}}


def test_the_job_of_a_whole_array_is_no_run(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("sbatch", ACCEPTS)
    submitted(cli)
    assert cli("status", "4711").errors == ["job 4711 is an array of 4 runs (grid-0 … grid-3: name one of them)"]
    assert cli("logs", "4711_2").errors == []


def test_the_script_of_an_array_says_what_those_of_its_runs_say(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("sbatch", ACCEPTS)
    # No end of a line to sbatch, nor to a shell.
    runs = Path("of \u2028\u0085 it's/runs").absolute()
    submitted(cli, "--array-limit", "2", "--runs-dir", str(runs))
    own = [line for line in (runs / "grid-0" / "job.sh").read_text().split("\n") if line.startswith("#SBATCH")]
    lines = (runs / "grid" / "job.sh").read_text().split("\n")
    differing = ("--job-name", "--comment", "--output", "--array")
    assert [line for line in own if not line.startswith(tuple(f"#SBATCH {option}" for option in differing))] == [
        line for line in lines if line.startswith("#SBATCH") and not any(option in line for option in differing)
    ]
    assert "#SBATCH --array=0-3%2" in lines
    [output] = [line for line in lines if line.startswith("#SBATCH --output=")]
    assert output == f"#SBATCH --output={shlex.quote(f'{runs}/grid-%1a/job.log')}"


def test_the_commands_that_it_prints_are_ready_for_a_shell(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("sbatch", ACCEPTS)
    fake_command("squeue", "printf '%s|PENDING|Priority|\\n' 4711 4711_0 4711_1")

    def shown(*given: str) -> Any:
        """What the printed command for the status says."""
        place = ("--runs-dir", "it's here", "--cluster", "slurm")
        lines = cli("submit", "llama3_debug", *given, *place).out.splitlines()
        [command] = [line.removeprefix("  status  ") for line in lines if line.startswith("  status  ")]
        program, *words = shlex.split(command)
        assert program == "titan-slurm"
        return json.loads(cli(*words, "--json").out)

    found = shown("--array", "--set", "training.max_steps=3,4", "--name", "grid")
    assert [each["name"] for each in found] == ["grid-0", "grid-1"]
    assert shown("--name", "alone")["name"] == "alone"


def test_the_folder_of_an_array_goes_with_the_last_of_its_runs(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("sbatch", ACCEPTS)
    fake_command("squeue", "printf '4711_%s|FAILED|NonZeroExitCode|n1\\n' 0 1 2 3")
    runs = submitted(cli)
    assert cli("runs", "rm", "grid-0", "grid-1", "grid-2", "--yes").errors == []
    assert array_errors(cli) == [
        f"--name: there is a sweep grid already, with its script and sweep.json in {runs}/grid "
        "(choose another name, or titan-slurm runs rm --name 'grid-*'; it goes with the last of its runs)"
    ]
    removed = cli("runs", "rm", "grid-3", "--yes")
    assert (
        removed.out
        == f"removed run grid-3 ({runs}/grid-3); it was the last of its sweep, and {runs}/grid is gone too\n"
    )
    assert list(runs.iterdir()) == []
    submitted(cli)


def test_what_sbatch_refuses_leaves_nothing_behind(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("sbatch", "echo 'sbatch: error: no more of them' >&2; exit 1")
    assert array_errors(cli) == ["sbatch refused the job: sbatch: error: no more of them"]
    assert list(Path("runs").iterdir()) == []


def test_who_is_killed_while_submitting_leaves_runs_that_are_found_to_have_jobs(
    cli: CommandLine, fake_command: FakeCommand
) -> None:
    fake_command("sbatch", 'case "$*" in *--test-only*) exit 1;; esac; kill -9 $PPID')
    given = ("--name", "grid", "--array", "--set", "training.max_steps=3,4", "--cluster", "slurm")
    assert cli.process("submit", "llama3_debug", *given).code == -9
    comment = json.loads(Path("runs/grid/sweep.json").read_text())["comment"]
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    # Slurm has taken them, one has even begun, and there are others of that name.
    of_user = "".join(rf"{job}|{when}|{comment}|grid\n" for job in ("4711_0", "4711_1"))
    other = rf"4712_1|{when}|titan-slurm grid-00000000|grid\n"
    states = r"4711_0|RUNNING|None|n1\n4711_1|PENDING|Resources|\n"
    fake_command("squeue", f"case \"$*\" in *%k*) printf '{of_user}{other}';; *) printf '{states}';; esac")
    # For as long as sbatch is at work, nobody concludes anything.
    give_up = time.monotonic() + 30
    while (found := json.loads(cli("status", "--json").out))[-1]["job_id"] is None:
        assert time.monotonic() < give_up
    assert [(run["name"], run["job_id"], run["state"]) for run in found] == [
        ("grid-0", "4711_0", "queued"),
        ("grid-1", "4711_1", "queued"),
    ]


def test_a_name_that_is_taken_leaves_everything_as_it_was(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("sbatch", ACCEPTS)
    assert cli("submit", "llama3_debug", "--name", "grid-1", "--cluster", "slurm").code == 0
    [error] = array_errors(cli)
    assert error.startswith("--name: there is a run grid-1 already")
    assert [path.name for path in Path("runs").iterdir()] == ["grid-1"]


def array_errors(cli: CommandLine) -> list[str]:
    return cli(
        "submit", "llama3_debug", "--name", "grid", "--array", "--set", "training.max_steps=3,4", "--cluster", "slurm"
    ).errors
