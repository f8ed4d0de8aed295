"""`titan-slurm report`, on a run that was recorded."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import CommandLine
from titan_slurm.run.directory import RunDirectory

MakeRun = Callable[..., RunDirectory]
# What programs may rely on.
KEYS = {
    "name", "path", "recipe", "state", "reason", "made", "begin", "end", "wall_seconds", "step", "max_steps", "tokens",
    "loss", "validation_loss", "tokens_per_second", "mfu", "step_seconds", "memory_reserved_gib", "ranks", "device",
    "gpu_hours", "goodput", "parts", "steps_lost", "steps_replayed", "slowest", "attempts", "timeline",
}  # fmt: skip
ATTEMPT_KEYS = {
    "number", "verdict", "reason", "nodes", "ranks", "job_id", "begin", "end", "seconds", "first_step", "last_step",
    "steps_lost", "start_up", "parts",
}  # fmt: skip
PICTURES = ["grad_norm", "learning_rate", "loss", "ranks_apart", "step_time", "timeline", "tokens_per_second"]


def test_a_terminal_sees_it_in_short(cli: CommandLine, interrupted: RunDirectory) -> None:
    assert interrupted.exists()
    done = cli("report", "interrupted")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert "goodput  49.7 % = scheduling 91.6 % × runtime 54.2 %" in done.out
    assert ["wall", "time", "4", "min", "57", "s"] in lines
    crashed = next(line for line in lines if line[1:2] == ["crashed"])
    assert crashed[0] == "2"
    assert crashed[2] == "node1"
    assert crashed[5:9] == ["56.8", "s", "58–110", "30"]
    assert [
        "3",
        "0.3",
        "s",
        "6.4",
        "s",
        "0.1",
        "s",
        "0.0",
        "s",
        "0.4",
        "s",
        "0.2",
        "s",
        "0.1",
        "s",
        "7.5",
        "s",
    ] in lines


def test_json_for_machines(cli: CommandLine, interrupted: RunDirectory) -> None:
    value = json.loads(cli("report", "interrupted", "--json").out)
    assert set(value) == KEYS
    assert (value["name"], value["state"], value["path"]) == ("interrupted", "completed", str(interrupted.path))
    assert set(value["goodput"]) == {"scheduling", "runtime", "program", "total"}
    assert set(value["attempts"][0]) == ATTEMPT_KEYS
    assert set(value["parts"][0]) == {"name", "seconds", "share", "gpu_hours", "meaning"}
    assert set(value["timeline"][0]) == {"begin", "end", "part", "attempt"}
    assert value["mfu"] is None
    assert abs(sum(part["seconds"] for part in value["parts"]) - value["wall_seconds"]) < 1e-6


def test_a_loss_that_is_no_number_is_null(cli: CommandLine, interrupted: RunDirectory) -> None:
    with interrupted.metrics_file.open("a") as file:
        file.write('{"step": 241, "time": 1795385228.0, "attempt": 5, "loss": NaN, "tokens": Infinity}\n')

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    done = cli("report", "interrupted", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out, parse_constant=refuse)["loss"] is None


def test_files(cli: CommandLine, interrupted: RunDirectory) -> None:
    assert interrupted.exists()
    done = cli("report", "interrupted", "--html", "page.html", "--png", "new/pictures")
    assert done.code == 0, done.err
    assert Path("page.html").read_text().rstrip().endswith("</html>")
    assert sorted(path.name for path in Path("new/pictures").iterdir()) == [f"{name}.png" for name in PICTURES]
    assert "note: wrote page.html" in done.err.splitlines()
    assert done.out == ""


def test_several_runs(cli: CommandLine, interrupted: RunDirectory, make_run: MakeRun) -> None:
    assert interrupted.exists()
    make_run(name="other")
    lines = [line.split() for line in cli("report", "--compare", "interrupted", "other").out.splitlines()]
    assert lines[0] == ["interrupted", "other"]
    assert ["state", "completed", "created"] in lines
    assert ["attempts", "5", "0"] in lines
    both = json.loads(cli("report", "interrupted", "other", "--compare", "--json").out)
    assert [run["name"] for run in both["runs"]] == ["interrupted", "other"]
    assert cli("report", "--compare", "interrupted", "other", "--html", "both.html").code == 0
    assert "other" in Path("both.html").read_text()


def test_what_cannot_be_done_is_said_at_once(cli: CommandLine, make_run: MakeRun) -> None:
    make_run(name="one")
    make_run(name="two")
    done = cli("report", "one", "none", "nowhere")
    assert done.code == 2
    assert len(done.errors) == 3
    assert done.errors[0] == "report: 3 runs were named (--compare puts them beside one another)"
    assert cli("report", "--compare", "one").errors == [
        "--compare: one run has nothing to be compared with (name another)"
    ]
    Path("file").touch()
    done = cli("report", "one", "--html", "no/such/page.html", "--png", "file")
    assert (done.code, done.errors) == (2, ["--html: there is no folder no/such", "--png: file is no folder"])
    assert cli("report", "one", "--html", ".").errors == ["--html: . is a folder (name a file)"]


def test_a_run_that_was_never_started(cli: CommandLine, make_run: MakeRun) -> None:
    make_run(name="fresh")
    done = cli("report", "fresh", "--html", "page.html")
    assert (done.code, done.errors) == (0, [])
    assert cli("report", "fresh").code == 0
