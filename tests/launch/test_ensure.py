"""What `ensure` makes of each state of a run, with a Slurm that says what the test wants. The real one: tests/slurm."""

import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_state import attempted
from tests.conftest import CommandLine, Outcome
from titan_slurm.launch import cron
from titan_slurm.launch import ensure as ensuring
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_json

FakeCommand = Callable[[str, str], Callable[[], list[str]]]
MakeRun = Callable[..., RunDirectory]

# A submission that nobody lived to end.
CUT_SHORT = {"time": 1.0, "user": "ada", "user_id": "0", "cluster": "slurm", "slurm_cluster": ""}
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


class Slurm:
    """A Slurm of the test's own: what squeue says, and the calls of sbatch."""

    def __init__(self, fake: FakeCommand) -> None:
        self.fake = fake
        fake("scontrol", "echo 'Slurmctld(primary) at here is UP'")
        fake("sacct", "exit 1")
        self.sbatch("echo 'Submitted batch job 8'")
        self.squeue(FORGOTTEN)

    def squeue(self, script: str) -> None:
        self.fake("squeue", script)

    def has(self, state: str) -> None:
        """Job 7 is in this state, as far as squeue knows."""
        self.squeue(f"echo '7|{state}|None|n1'")

    def sbatch(self, script: str) -> None:
        self.calls = self.fake("sbatch", script)


@pytest.fixture
def slurm(fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setattr(ensuring, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(cron, "_SLURM_FOLDERS", ("/nonexistent",))
    return Slurm(fake_command)


@pytest.fixture
def run(make_run: MakeRun, slurm: Slurm) -> RunDirectory:  # noqa: ARG001
    """A run whose job 7 is no longer known to Slurm."""
    return with_job(make_run())


def with_job(run: RunDirectory) -> RunDirectory:
    run.add_job({"job_id": "7", "cluster": "slurm", "time": 1.0})
    return run


def runs() -> list[str]:
    """What is in the folder of runs, beside its lock."""
    return sorted(path.name for path in Path("runs").iterdir() if path.name != ".lock")


def ensure(cli: CommandLine, *arguments: str) -> tuple[int, str]:
    """The exit code and the one line."""
    outcome = cli("ensure", *arguments)
    [line] = (outcome.out + outcome.err).splitlines()
    assert bool(outcome.out) == (outcome.code == 0)
    return outcome.code, line


def test_a_recipes_run_is_called_like_it_and_is_one(cli: CommandLine, slurm: Slurm) -> None:
    assert ensure(cli, "llama3_debug") == (0, "submitted run llama3_debug as job 8")
    slurm.squeue("echo '8|PENDING|Priority|'")
    assert ensure(cli, "llama3_debug") == (0, "run llama3_debug is queued as job 8, at step 0 of 60")
    assert ensure(cli, "llama3_debug", "--name", "mine")[1] == "submitted run mine as job 8"
    assert cli("ensure", "llama3_debug", "--quiet") == Outcome(0, "", "")
    assert len(slurm.calls()) == 2
    assert runs() == ["llama3_debug", "mine"]


@pytest.mark.parametrize(
    ("state", "said"),
    [("PENDING", "queued"), ("RUNNING", "queued"), ("COMPLETING", "stopping"), ("REQUEUE_HOLD", "queued")],
)
def test_a_job_that_lives(cli: CommandLine, slurm: Slurm, run: RunDirectory, state: str, said: str) -> None:
    slurm.has(state)
    assert ensure(cli, run.name) == (0, f"run mine is {said} as job 7, at step 0 of 60")
    assert slurm.calls() == []


@pytest.mark.parametrize("squeue", ["echo 'Unable to contact slurm controller' >&2; exit 1", "exit 1"])
def test_a_controller_that_does_not_answer(cli: CommandLine, slurm: Slurm, run: RunDirectory, squeue: str) -> None:
    slurm.squeue(squeue)
    slurm.fake("scontrol", "echo 'Slurmctld(primary) at here is DOWN'")
    before = sorted(run.path.rglob("*"))
    for arguments in (("mine",), ("llama3_debug", "--name", "mine"), ("llama3_debug", "--name", "new")):
        code, line = ensure(cli, *arguments)
        assert (code, line) == (75, f"run {arguments[-1]}: Slurm's controller does not answer; nothing is changed")
    assert cli("ensure", "mine", "--quiet").err
    assert slurm.calls() == []
    assert runs() == ["mine"]
    assert [path for path in sorted(run.path.rglob("*")) if path.name != ".lock"] == before


@pytest.mark.parametrize(
    ("verdict", "more", "code", "said"),
    [
        ("completed", {"again": False}, 0, "run mine is finished: because"),
        (
            "cancelled",
            {"again": False},
            3,
            "run mine was cancelled (because); `titan-slurm resume /",
        ),
        ("crashed", {"again": False, "why": "spent"}, 4, "run mine has failed for good (because; spent);"),
        ("time_limit", {"again": False, "why": "spent"}, 4, "run mine has failed for good (because; spent);"),
        # Slurm had decided it: nobody asked for an end.
        (
            "time_limit",
            {"again": False, "why": ""},
            0,
            "submitted run mine again as job 8, from step 0 (job 7 ended as ",
        ),
        # It was to come back, and the node could not reach the controller, or Slurm has forgotten it.
        (
            "crashed",
            {"again": False, "stranded": True, "why": "cannot requeue"},
            0,
            "submitted run mine again as job 8",
        ),
        ("preempted", {"again": True}, 0, "submitted run mine again as job 8"),
        # Given by whoever looked: the job had said nothing.
        ("node_failure", {}, 0, "submitted run mine again as job 8"),
        (None, {}, 0, "submitted run mine again as job 8"),
    ],
)
def test_a_job_that_has_ended(
    cli: CommandLine, slurm: Slurm, run: RunDirectory, verdict: str | None, more: dict[str, Any], code: int, said: str
) -> None:
    attempt = attempted(run)
    if verdict:
        attempt.give_verdict(verdict, "because", **more)
    found = ensure(cli, "mine")
    assert (found[0], found[1][: len(said)]) == (code, said)
    submitted = said.startswith("submitted")
    assert len(slurm.calls()) == submitted
    if submitted:
        # By the script that the run has.
        assert slurm.calls()[0].split()[-1] == str(run.script_file)
        assert [job["job_id"] for job in run.jobs()] == ["7", "8"]
        assert not run.submission_file.exists()


@pytest.mark.parametrize(("verdict", "code"), [("time_limit", 0), ("preempted", 0), ("crashed", 4), ("hung", 4)])
def test_a_run_whose_jobs_may_not_requeue_themselves(
    cli: CommandLine, slurm: Slurm, make_run: MakeRun, verdict: str, code: int
) -> None:
    run = with_job(make_run("requeue.enabled=false"))
    attempted(run).give_verdict(verdict, "because", again=False, why="[requeue] enabled = false")
    assert ensure(cli, "mine")[0] == code
    assert len(slurm.calls()) == (code == 0)


def test_a_job_that_dies_again_and_again_is_left_when_the_budget_is_spent(
    cli: CommandLine, slurm: Slurm, make_run: MakeRun
) -> None:
    with_job(make_run("requeue.stalled=2"))
    codes = [ensure(cli, "mine") for _ in range(4)]
    assert [code for code, _ in codes] == [0, 0, 4, 4]
    assert "submitted again 2 times in a row without a new checkpoint ([requeue] stalled = 2)" in codes[-1][1]
    # Whoever goes on by hand has looked at it.
    slurm.sbatch("echo 'Submitted batch job 9'")
    assert cli("submit", "llama3_debug", "--name", "mine", "--resume", "--cluster", "slurm").code == 0
    assert ensure(cli, "mine")[0] == 0


def test_a_job_that_somebody_brought_back_is_seen(cli: CommandLine, slurm: Slurm, run: RunDirectory) -> None:
    attempted(run).give_verdict("time_limit", "because", again=False, why="")
    slurm.has("PENDING")
    assert ensure(cli, "mine") == (0, "run mine is failed, and Slurm still has job 7 (PENDING) of it")
    assert slurm.calls() == []


def test_a_changed_recipe_counts_only_if_that_is_said(cli: CommandLine, slurm: Slurm, run: RunDirectory) -> None:
    slurm.has("RUNNING")
    changed = ("llama3_debug", "--name", "mine", "--set", "training.max_steps=120", "--nodes", "2")
    code, line = ensure(cli, *changed)
    assert (code, line.partition("; ")[2]) == (
        0,
        "its recipe has changed: slurm.nodes, training.max_steps; it keeps its plan without --update",
    )
    slurm.squeue(FORGOTTEN)
    ensure(cli, *changed)
    assert run.plan().max_steps == 60
    ensure(cli, *changed, "--update")
    assert (run.plan().max_steps, len(run.jobs())) == (120, 3)
    # What may not change is refused, as by `submit --resume`.
    slurm.squeue(FORGOTTEN)
    outcome = cli("ensure", *changed, "--update", "--set", "training.seed=1")
    assert (outcome.code, outcome.errors) == (
        2,
        ["--resume: debug.seed was 42 in this run and is now 1 (start a new run, or leave it as it was)"],
    )


def test_a_finished_run_goes_on_where_its_recipe_has_more_steps(
    cli: CommandLine, slurm: Slurm, run: RunDirectory
) -> None:
    attempted(run).give_verdict("completed", "all 60 steps done", again=False)
    more = ("llama3_debug", "--name", "mine", "--set", "training.max_steps=120")
    assert ensure(cli, *more)[1].startswith("run mine is finished: all 60 steps done; its recipe has changed")
    assert slurm.calls() == []
    assert ensure(cli, *more, "--update")[1].startswith("submitted run mine again as job 8")


def test_a_recipe_that_broke_or_is_gone_stops_no_run(cli: CommandLine, slurm: Slurm, run: RunDirectory) -> None:
    Path("mine.toml").write_text("[training]\nmax_step = 3\n")
    for recipe in ("mine.toml", "gone.toml"):
        slurm.has("RUNNING")
        code, line = ensure(cli, recipe, "--name", "mine")
        assert code == 0
        assert line.endswith("and the run keeps its plan")
        assert cli("ensure", recipe).code == 2
    assert run.exists()


def test_what_is_refused_leaves_nothing(cli: CommandLine, slurm: Slurm) -> None:
    slurm.sbatch("echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1")
    outcome = cli("ensure", "llama3_debug")
    assert (outcome.code, outcome.errors) == (
        2,
        ["sbatch refused the job: sbatch: error: invalid partition specified: nowhere"],
    )
    assert runs() == []


def test_an_answer_that_was_lost_is_looked_for(cli: CommandLine, slurm: Slurm) -> None:
    slurm.sbatch(
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    )
    slurm.squeue("exit 1")
    code, line = ensure(cli, "llama3_debug")
    assert (code, "Socket timed out" in line) == (75, True)
    assert ensure(cli, "llama3_debug")[0] == 75
    run = RunDirectory(Path("runs/llama3_debug").absolute())
    comment = run.plan().job_comment
    # The controller is back, and has the job.
    slurm.squeue(
        f'[[ "$*" == *--user* ]] && echo "5|2026-11-22T10:00:00|{comment}|llama3_debug" || echo "5|PENDING|x|"'
    )
    assert ensure(cli, "llama3_debug") == (0, "run llama3_debug is queued as job 5, at step 0 of 60")
    assert len(slurm.calls()) == 1
    assert [job["job_id"] for job in run.jobs()] == ["5"]


def test_what_it_says_to_do_by_hand_works_in_any_folder(
    cli: CommandLine, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ("llama3_debug", "--name", "mine", "--runs-dir", str(tmp_path / "it's here"))
    assert ensure(cli, *given)[0] == 0
    run = RunDirectory(tmp_path / "it's here" / "mine")
    for verdict, code in (("cancelled", 3), ("crashed", 4)):
        attempted(run, code).give_verdict(verdict, "because", again=False, why="spent")
        found = ensure(cli, *given)
        assert found[0] == code
        _, command, after = found[1].split("`")
        assert after == " goes on with it"
        monkeypatch.chdir(tmp_path)
        slurm.sbatch("echo 'Submitted batch job 9'")
        program, *words = shlex.split(command)
        assert (program, cli(*words).out) == ("titan-slurm", "resumed run mine as job 9 on slurm\n")


def test_a_folder_of_runs_that_cannot_be_made(cli: CommandLine, slurm: Slurm) -> None:
    for folder, why in (("/proc/x", "No such file or directory"), ("/dev/null/x", "Not a directory")):
        outcome = cli("ensure", "llama3_debug", "--runs-dir", folder)
        assert (outcome.code, outcome.errors) == (2, [f"{folder}: cannot be made: {why}"])
    assert slurm.calls() == []


def test_a_run_that_others_take_away_is_not_tried_for_ever(cli: CommandLine, slurm: Slurm) -> None:
    slurm.sbatch("/bin/rm -r runs/llama3_debug; exit 1")
    assert ensure(cli, "llama3_debug") == (
        75,
        "run llama3_debug: another process was refused, and took it away; nothing is changed",
    )
    assert len(slurm.calls()) == 1


def test_no_connection_is_not_a_lost_answer(cli: CommandLine, slurm: Slurm) -> None:
    slurm.sbatch("echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert ensure(cli, "llama3_debug")[0] == 75
    assert runs() == []


def test_whoever_is_at_work_on_it_is_left_in_peace(cli: CommandLine, slurm: Slurm, run: RunDirectory) -> None:
    with run.lock():
        assert ensure(cli, "mine") == (75, "run mine: another process is submitting it; nothing is changed")
    assert slurm.calls() == []


def test_without_sbatch_nothing_starts_on_this_machine(
    cli: CommandLine, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    outcome = cli("ensure", "llama3_debug")
    assert outcome.code == 2
    assert outcome.errors[0].startswith("there is no sbatch, neither on the PATH (/nonexistent) nor in")
    assert not Path("runs").exists()
    assert slurm.calls() == []


def test_a_run_of_another_machine_cannot_be_seen(cli: CommandLine, make_run: MakeRun) -> None:
    run = make_run(cluster="local")
    run.add_job({"job_id": "1", "cluster": "local", "time": 1.0, "process_started": 1.0, "host": "elsewhere"})
    code, line = ensure(cli, "mine")
    assert (code, "machine elsewhere" in line) == (75, True)


def test_options_that_a_named_run_has_no_use_for(cli: CommandLine, run: RunDirectory) -> None:
    outcome = cli("ensure", str(run.path), "--nodes", "2", "--update")
    assert outcome.code == 2
    assert [error.split(":")[0] for error in outcome.errors] == ["--nodes", "--update"]


def test_neither_a_recipe_nor_a_run(cli: CommandLine) -> None:
    outcome = cli("ensure", "lama3_debug")
    assert outcome.errors == [
        f"lama3_debug: is neither a recipe nor a run in {Path('runs').absolute()} (did you mean 'llama3_debug'?)"
    ]


def test_the_line_for_cron_says_all_that_cron_does_not_know(
    cli: CommandLine, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = tmp_path / "50% sure"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, value in {
        "SLURM_CONF": "/etc/slurm/o'clock.conf",
        "TORCHTITAN_MODEL_NAME": "llama3",
        "TITAN_SLURM_WEBHOOK": "https://example.org/very-secret",
        "WANDB_API_KEY": "very-secret-too",
        "WANDB_MODE": "offline",
        "WANDB_BASE_URL": "https://wandb.lab.org",
        "WANDB_ENTITY": "lab",
        "WANDB_PROJECT": "it's 50%",
        "EDITOR": "vi",
    }.items():
        monkeypatch.setenv(name, value)
    outcome = cli("ensure", "llama3_debug", "--set", "slurm.account=50%", "--cluster", "slurm", "--print-cron")
    assert not Path("runs").exists()
    assert "secret" not in outcome.out
    assert "vi " not in outcome.out
    assert "jobs need them: WANDB_API_KEY, TITAN_SLURM_WEBHOOK" in outcome.out
    *comments, entry = outcome.out.splitlines()
    assert all(line.startswith("#") for line in comments)
    assert "#SCRON --account=50%" in comments
    assert slurm.calls() == []
    assert entry.startswith("*/10 * * * * cd ")
    line = entry.removeprefix("*/10 * * * * ")
    # As the shell has it, from cron (which turns a bare percent sign into a line break) or from scrontab.
    assert "%" not in line.replace("\\%", "")
    for text in (line.replace("\\%", "%"), line):
        program = shlex.split(line)[shlex.split(line).index("ensure") - 1]
        shown = text.replace(f"{program} ensure", 'env printf \'%s\\n\' "$PWD" "$SLURM_CONF" "$PATH" ensure')
        environment = {"PATH": "/usr/bin:/bin"}
        words = subprocess.run(["/bin/sh", "-c", shown], env=environment, capture_output=True, text=True).stdout
        # The variables reach the program, not the words of this shell.
        assert words.splitlines()[0] == str(here)
        assert words.splitlines()[3:] == [
            *("ensure", "llama3_debug", "--cluster", "slurm", "--set", "slurm.account=50%"),
            *("--name", "llama3_debug", "--runs-dir", str(here / "runs"), "--quiet"),
        ]
    assert f"PATH={tmp_path}/fakes:/usr/bin:/bin" in line
    assert shlex.quote("/etc/slurm/o'clock.conf") in line
    assert "TORCHTITAN_MODEL_NAME=llama3" in line
    words = shlex.split(line.replace("\\%", "%"))
    for expected in ("MODE=offline", "BASE_URL=https://wandb.lab.org", "ENTITY=lab", "PROJECT=it's 50%"):
        assert f"WANDB_{expected}" in words


def test_inside_a_job_its_variables_do_not_reach_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("HOME")
    cron.complete_environment()
    assert [name for name in os.environ if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert Path(os.environ["HOME"]).is_absolute()


def test_status_finds_a_job_whose_submission_was_cut_short(cli: CommandLine, slurm: Slurm, make_run: MakeRun) -> None:
    run = make_run()
    write_json(run.submission_file, CUT_SHORT)
    comment = run.plan().job_comment
    slurm.squeue(f'[[ "$*" == *--user=0* ]] && echo "5|2026-11-22T10:00:00|{comment}|mine" || echo "5|PENDING|x|"')
    found = json.loads(cli("status", "mine", "--json").out)
    assert (found["state"], found["job_id"]) == ("queued", "5")
    assert [(job["job_id"], job["user"]) for job in run.jobs()] == [("5", "ada")]
    assert not run.submission_file.exists()


@pytest.mark.parametrize(
    ("comment", "name", "when", "found"),
    [
        ("(null)", "mine", "1970-01-01T00:00:10", True),
        ("(null)", "mine", "1970-01-02T00:00:10", False),
        ("(null)", "other", "1970-01-01T00:00:10", False),
        ("titan-slurm other-run", "mine", "1970-01-01T00:00:10", False),
    ],
)
def test_where_comments_are_not_kept_it_is_name_and_time(
    cli: CommandLine,
    slurm: Slurm,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    comment: str,
    name: str,
    when: str,
    found: bool,
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        run = make_run()
        write_json(run.submission_file, CUT_SHORT)
        slurm.squeue('[[ "$*" == *--user=0* ]] || echo "5|PENDING|x|"')
        slurm.fake("sacct", f'[[ "$*" == *--name=* ]] && echo "5|{when}|{comment}|{name}"')
        assert json.loads(cli("status", "mine", "--json").out)["job_id"] == ("5" if found else None)
        # Only whoever submits concludes that there is no job.
        assert run.submission_file.exists() != found
    time.tzset()


def test_a_job_of_this_machine_that_nobody_wrote_down(cli: CommandLine, make_run: MakeRun) -> None:
    run = make_run(cluster="local")
    run.script_file.write_text("sleep 1000; true\n")
    with subprocess.Popen(["bash", run.script_file], start_new_session=True) as job:
        here = {"cluster": "local", "host": socket.gethostname()}
        write_json(run.submission_file, CUT_SHORT | here)
        assert ensure(cli, "mine") == (0, f"run mine is queued as job {job.pid}, at step 0 of 60")
        # Which waits for its end.
        assert cli("cancel", "mine").code == 0
    assert ensure(cli, "mine")[0] == 3
