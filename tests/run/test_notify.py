"""Who is told that a run has ended, by a real server and real commands, and what may not come of it."""

import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandLine
from tests.run.test_attempt import describes_job, in_job  # noqa: F401 (a fixture)
from titan_slurm.run import leave, notify
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_json

FakeCommand = Callable[[str, str], Callable[[], list[str]]]
MakeRun = Callable[..., RunDirectory]

SECRET = "T0SECRET/B0SECRET/very-secret-indeed"


class Server:
    """A webhook: what was posted to it, and what it answers."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.status = 200
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(server.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/services/{SECRET}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def run(make_run: MakeRun, in_job: Callable[..., None], fake_command: FakeCommand) -> RunDirectory:  # noqa: F811
    """A run of which a job is running."""
    in_job("1")
    fake_command("scontrol", describes_job("scontrol_running.txt"))
    return make_run("requeue.crashed=0")


def with_profile(run: RunDirectory, **settings: Any) -> RunDirectory:
    """The run as one whose cluster profile has this [notify]."""
    plan = json.loads(run.plan_file.read_text())
    plan["profile"] = {"name": "site", "path": "/etc/site.toml", "given": {"notify": settings}, "mounts": []}
    write_json(run.plan_file, plan)
    return run


def ended(run: RunDirectory, *, finished: bool = False) -> Attempt:
    """An attempt of the run that has ended it."""
    attempt = leave.begin(run)
    if finished:
        attempt.finish(60)
    assert leave.end(run, attempt, 0 if finished else 1) == (0 if finished else 1)
    return attempt


def told(run: RunDirectory) -> list[dict[str, Any]]:
    """What the run's events say of who was told."""
    return [
        {name: event[name] for name in ("webhook", "command") if name in event}
        for event in run.events()
        if event["event"] == "notified"
    ]


def everything_in(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("finished", [True, False])
def test_the_end_of_a_run_is_posted_once(
    run: RunDirectory, server: Server, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    monkeypatch.setenv("TITAN_SLURM_WEBHOOK", server.url)
    attempt = ended(run, finished=finished)
    notify.tell(run, attempt)
    how = "completed: all 60 steps done" if finished else "failed (crashed): a rank left with exit code 1"
    [body] = server.bodies
    assert body["text"].startswith(f"run mine has {how}")
    assert ("([requeue] crashed = 0)" in body["text"]) == (not finished)
    assert f"attempt 1, {run.path}" in body["text"]
    assert told(run) == [{"webhook": "sent"}]
    assert SECRET not in everything_in(run.path)


def test_the_url_may_stand_in_a_file_that_only_its_owner_reads(
    run: RunDirectory, server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "webhook"
    file.write_text(server.url + "\n")
    file.chmod(0o640)
    ended(with_profile(run, webhook_file=str(file)))
    assert (told(run), server.bodies) == ([{"webhook": f"{file} can be read by others (chmod 600)"}], [])
    file.chmod(0o600)
    ended(run)
    assert (told(run)[1:], len(server.bodies)) == ([{"webhook": "sent"}], 1)
    assert SECRET not in everything_in(run.path)


def test_what_comes_back_is_not_the_end(
    make_run: MakeRun, run: RunDirectory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITAN_SLURM_WEBHOOK", server.url)
    comes_back = make_run("requeue.crashed=3", name="comes-back")
    attempt = leave.begin(comes_back)
    leave.end(comes_back, attempt, 1)
    assert (attempt.verdict() or {})["again"]
    cancelled = leave.begin(run)
    run.cancel({"time": 0, "job_id": "1", "user": "ada"})
    leave.end(run, cancelled, 1)
    assert (cancelled.verdict() or {})["verdict"] == "cancelled"
    assert server.bodies == []


def test_a_budget_that_is_found_spent_at_the_next_start_is_told_of(
    make_run: MakeRun,
    run: RunDirectory,  # noqa: ARG001 (its job)
    in_job: Callable[..., None],  # noqa: F811
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TITAN_SLURM_WEBHOOK", server.url)
    preempted = make_run("requeue.stalled=0", name="preempted")
    leave.begin(preempted)
    in_job("1", 1)
    with pytest.raises(SystemExit, match="stalled"):
        leave.begin(preempted)
    assert [body["text"].split(":")[0] for body in server.bodies] == ["run preempted has failed (preempted)"]


def test_a_server_that_hangs_holds_nothing_up_and_changes_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_PATIENCE_S", 0.3)
    # It takes the connection and never says a word: it is still open when all is over.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("TITAN_SLURM_WEBHOOK", f"http://127.0.0.1:{silent.getsockname()[1]}/{SECRET}")
        attempt = ended(run)
        connection, _ = silent.accept()
        connection.close()
    assert (attempt.verdict() or {})["verdict"] == "crashed"
    assert told(run)[0]["webhook"] in ("no answer within 0.3 s", "TimeoutError")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "TITAN_SLURM_WEBHOOK is not one URL that begins with https://"),
        (f"https://host.invalid:port/{SECRET}", "InvalidURL"),
        (f"http://127.0.0.1:1/{SECRET}", "Connection refused"),
    ],
)
def test_a_url_that_leads_nowhere(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setenv("TITAN_SLURM_WEBHOOK", url)
    ended(run)
    assert told(run) == [{"webhook": said}]
    assert SECRET not in everything_in(run.path)


def test_a_server_that_refuses(run: RunDirectory, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_SLURM_WEBHOOK", server.url)
    server.status = 404
    ended(run)
    assert told(run) == [{"webhook": "refused with HTTP 404"}]


def test_a_command_gets_the_text(run: RunDirectory, tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = f'cat > {said}; echo "$TITAN_SLURM_VERDICT $TITAN_SLURM_RUN $1" >> {said}'
    ended(with_profile(run, command=["bash", "-c", script, "name", "$(touch injected)"]), finished=True)
    first, second = said.read_text().splitlines()
    assert first.startswith("run mine has completed: all 60 steps done (job 1 on ")
    assert second == f"completed {run.path} $(touch injected)"
    assert told(run) == [{"command": "sent"}]


@pytest.mark.parametrize(
    ("script", "said"),
    [("exit 3", "left with exit code 3"), ("sleep 1000 & wait", "not done within 0.3 s")],
)
def test_a_command_that_fails_or_hangs(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(notify, "_PATIENCE_S", 0.3)
    attempt = ended(with_profile(run, command=["bash", "-c", script]))
    assert told(run) == [{"command": said}]
    assert (attempt.verdict() or {})["verdict"] == "crashed"


def test_a_command_that_is_not_there(run: RunDirectory) -> None:
    ended(with_profile(run, command=["/nonexistent/tell"]))
    assert told(run) == [{"command": "/nonexistent/tell: No such file or directory"}]


def profile(text: str) -> None:
    Path("clusters").mkdir(exist_ok=True)
    Path("clusters/hpc.toml").write_text(text)


def test_mail_is_slurms(cli: CommandLine) -> None:
    profile('[notify]\nmail = "ada@lab.org"\n')
    script = cli("render", "llama3_debug", "--cluster", "hpc").out
    assert "#SBATCH --mail-user=ada@lab.org\n#SBATCH --mail-type=END,FAIL\n" in script
    # A recipe may want it otherwise.
    script = cli("render", "llama3_debug", "--cluster", "hpc", "--set", "slurm.sbatch.mail-type=ALL").out
    assert "#SBATCH --mail-type=ALL\n" in script
    assert "END,FAIL" not in script


def test_a_profile_that_would_give_the_secret_away(cli: CommandLine, tmp_path: Path) -> None:
    slack = "https://hooks.slack.com/services/T0/B0/secret"
    profile(f'[notify]\nwebhook_file = "{slack}"\n')
    [error] = cli("submit", "llama3_debug", "--cluster", "hpc").errors
    assert error.endswith("must be an absolute path")
    profile(f'[notify]\ncommand = ["curl", "--data", "@-", "{slack}"]\n')
    [error] = cli("submit", "llama3_debug", "--cluster", "hpc").errors
    assert "cluster.notify.command: holds credentials, which would be written into the run" in error
    for mode, text, what in (
        (0o644, slack, "can be read by others (chmod 600)"),
        (0o600, "-", "does not hold one URL"),
    ):
        file = tmp_path / f"webhook-{mode:o}"
        file.write_text(text)
        file.chmod(mode)
        profile(f'[notify]\nwebhook_file = "{file}"\n')
        [error] = cli("submit", "llama3_debug", "--cluster", "hpc").errors
        assert f"clusters/hpc.toml:2: notify.webhook_file: {file} {what}" in error
        assert "secret" not in error
    assert not Path("runs").exists()


def test_the_secret_is_no_part_of_a_run(cli: CommandLine) -> None:
    secret = f"https://example.org/hooks/{SECRET}"
    outcome = cli("render", "llama3_debug", env={"TITAN_SLURM_WEBHOOK": secret})
    assert SECRET not in outcome.out + outcome.err
    outcome = cli(
        "submit",
        "llama3_debug",
        "--set",
        f"slurm.account={secret}",
        env={"TITAN_SLURM_WEBHOOK": secret} | dict(os.environ),
    )
    assert "holds credentials" in outcome.errors[0]
