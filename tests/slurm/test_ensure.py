"""`titan-slurm ensure` on a real cluster: many at once, from cron, without a controller, after a kill at the worst
instant, and after each end of a run. No job here trains: they are held, or leave at once."""

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import tomli_w

from tests.slurm.conftest import Cluster
from titan_slurm.cli import main
from titan_slurm.launch import ensure as ensuring
from titan_slurm.run.directory import RunDirectory

HELD = ("llama3_debug", "--set", "slurm.sbatch.hold=true")
ROUNDS, AT_ONCE = 50, 8

# What a rank does at its end, in the place of ranks.
FINISH = """{{ python | sh }} -c '
import os, pathlib
from titan_slurm.run.attempt import Attempt
Attempt(pathlib.Path(os.environ["TITAN_SLURM_ATTEMPT"])).finish(60)'
"""

# Processes of their own that have imported what they need, and begin in the same instant.
RACE = """
import contextlib, gc, io, os, sys
import titan_slurm.launch.executors
from titan_slurm.cli import main

def call(*words):
    sys.argv = ["titan-slurm", *words]
    try:
        main()
    except SystemExit as left:
        return left.code or 0
    return 0

rounds, at_once, *words = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    call("render", *words)
gc.freeze()
for number in range(int(rounds)):
    wait, go = os.pipe()
    children = []
    for _ in range(int(at_once)):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(go)
            os.read(wait, 1)
            code = 99
            try:
                code = call("ensure", *words, "--name", f"race-{number}")
                sys.stdout.flush()
            finally:
                os._exit(code)
    os.close(wait)
    os.close(go)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""


def queue(cluster: Cluster, prefix: str) -> list[str]:
    """The names of the jobs in Slurm's queue that begin so."""
    names = cluster.run("squeue", "--noheader", "--format=%j").stdout.split()
    return sorted(name for name in names if name.startswith(prefix))


def jobs_of(cluster: Cluster, name: str) -> list[str]:
    """The jobs that a run knows of."""
    return [job["job_id"] for job in RunDirectory(cluster.path(name)).jobs()]


def site(cluster: Cluster, name: str, launch: str, **profile: object) -> tuple[str, ...]:
    """Arguments for a run that has this in the place of its ranks."""
    for folder, text in (
        (
            "templates",
            f'{{% extends "titan_slurm/base.sbatch.j2" %}}\n{{% block launch %}}\n{launch}\n{{% endblock %}}\n',
        ),
        ("clusters", tomli_w.dumps({"cluster": {"template": name}} | profile)),
    ):
        path = cluster.home / folder / f"{name}{'.sbatch.j2' if folder == 'templates' else '.toml'}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return ("llama3_debug", "--cluster", name, "--name", name)


def test_of_many_at_once_one_submits(cluster: Cluster) -> None:
    said = cluster.run(sys.executable, "-c", RACE, str(ROUNDS), str(AT_ONCE), *HELD).stdout.splitlines()
    found = queue(cluster, "race-")
    cluster.run("scancel", "--user=root")
    names = sorted(f"race-{number}" for number in range(ROUNDS))
    assert found == names
    assert sorted(line.split()[2] for line in said if line.startswith("submitted ")) == names
    assert len([line for line in said if " is queued as job " in line]) == ROUNDS * (AT_ONCE - 1)
    assert [len(jobs_of(cluster, name)) for name in names] == [1] * ROUNDS


def test_by_the_line_for_cron(cluster: Cluster) -> None:
    lines = cluster.titan_slurm("ensure", *HELD, "--name", "by-cron", "--print-cron").stdout.splitlines()
    command = lines[-1].removeprefix("*/10 * * * * ").replace("\\%", "%")
    bare = {"SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", "LOGNAME": "root"}
    for _ in range(2):
        done = subprocess.run(["/bin/sh", "-c", command], env=bare, cwd="/", capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert queue(cluster, "by-cron") == ["by-cron"]
    cluster.titan_slurm("cancel", "by-cron")


def test_without_a_controller_nothing_changes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensuring, "_PATIENCE_S", 0.0)
    cluster.titan_slurm("ensure", *HELD, "--name", "alone")
    cluster.run("scontrol", "shutdown", "slurmctld")
    try:
        deadline = time.monotonic() + 60
        while " is DOWN" not in cluster.run("scontrol", "ping", check=False).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for name in ("alone", "new"):
            line = f"run {name}: Slurm's controller does not answer; nothing is changed\n"
            assert ensure_here(cluster, *HELD, "--name", name, "--quiet") == (75, "", line)
    finally:
        # As tools/slurm-cluster does: it knows its daemons by the folder that they work in.
        with (cluster.folder / "log" / "slurmctld.out").open("ab") as log:
            environment, folder = cluster.environment, cluster.folder / "run"
            subprocess.Popen(
                ["slurmctld", "-D"], env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while " is UP" not in cluster.run("scontrol", "ping", check=False).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not cluster.path("new").exists()
    assert queue(cluster, "alone") == ["alone"]
    assert ensure_here(cluster, *HELD, "--name", "alone")[:2] == (
        0,
        f"run alone is queued as job {jobs_of(cluster, 'alone')[0]}, at step 0 of 60\n",
    )
    cluster.titan_slurm("cancel", "alone")


def ensure_here(cluster: Cluster, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `ensure` in this process."""
    out, err, words = io.StringIO(), io.StringIO(), ["titan-slurm", "ensure", *arguments]
    runs = str(cluster.home / "runs")
    with (
        mock.patch.dict(os.environ, cluster.environment | {"TITAN_SLURM_RUNS": runs}, clear=True),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        main()
    return int(left.value.code or 0), out.getvalue(), err.getvalue()


def killed(
    cluster: Cluster, name: str, script: str, *arguments: str, verb: str = "submit", command: str = "sbatch"
) -> None:
    """Submit a held run by a process that is killed for good while sbatch is at work, or another command of Slurm's,
    which `script` stands for."""
    folder = cluster.home / f"bin-{name}"
    folder.mkdir()
    wrapper = folder / command
    real = cluster.run("bash", "-c", f"command -v {command}").stdout.strip()
    asked = f'case " $* " in *" --test-only "*) exec {real} "$@";; esac'
    wrapper.write_text(f"#!/bin/bash\n{asked}\nreal={real}\n{script}\n")
    wrapper.chmod(0o755)
    path = f"{folder}:{cluster.environment['PATH']}"
    done = cluster.with_environment(PATH=path).titan_slurm(verb, *(arguments or HELD), "--name", name, check=False)
    assert done.returncode == -9
    assert jobs_of(cluster, name) == [] or command != "sbatch"


@pytest.mark.parametrize("verb", ["status", "ensure", "resume", "cancel"])
def test_a_job_that_nobody_lived_to_write_down_is_found(cluster: Cluster, verb: str) -> None:
    name = f"killed-by-{verb}"
    killed(cluster, name, '"$real" "$@"; kill -9 $PPID')
    [job_id] = cluster.run("squeue", "--noheader", "--format=%i", f"--name={name}").stdout.split()
    if verb == "status":
        assert (cluster.status(name)["state"], cluster.status(name)["job_id"]) == ("queued", job_id)
    elif verb == "ensure":
        said = cluster.titan_slurm("ensure", *HELD, "--name", name).stdout
        assert said == f"run {name} is queued as job {job_id}, at step 0 of 60\n"
    elif verb == "resume":
        done = cluster.titan_slurm("submit", *HELD, "--name", name, "--resume", check=False)
        assert f"run {name} is queued as job {job_id}; end that first" in done.stderr
    else:
        assert "cancelled" in cluster.titan_slurm("cancel", name).stdout
    assert jobs_of(cluster, name) == [job_id]
    assert queue(cluster, name) == ([] if verb == "cancel" else [name])
    cluster.titan_slurm("cancel", name)


CHAIN = ("llama3_debug", "--chain", "3", "--set", "slurm.sbatch.begin=now+1hour")
AFTER_TWO = 'echo >> {0}; "$real" "$@"; if [ "$(wc -l < {0})" = 2 ]; then kill -9 $PPID; fi'
BEFORE_RELEASE = '[ "$1" = release ] && kill -9 $PPID; exec "$real" "$@"'


def test_a_chain_that_was_cut_short_is_one_job(cluster: Cluster) -> None:
    killed(cluster, "half", AFTER_TWO.format(cluster.home / "count"), *CHAIN)
    [first, second] = sorted(cluster.run("squeue", "--noheader", "--format=%i", "--name=half").stdout.split(), key=int)
    assert cluster.titan_slurm("ensure", "half").stdout.startswith("submitted run half as job ")
    for job_id in (first, second):
        cluster.accounting(job_id, "CANCELLED")
    assert queue(cluster, "half") == ["half"]
    cluster.titan_slurm("cancel", "half")


def test_a_chain_that_nobody_lived_to_release_begins(cluster: Cluster) -> None:
    killed(cluster, "unreleased", BEFORE_RELEASE, *CHAIN, command="scontrol")
    assert len(jobs_of(cluster, "unreleased")) == 3
    assert cluster.status("unreleased")["reason"] != "JobHeldUser"
    assert queue(cluster, "unreleased") == ["unreleased"] * 3
    cluster.titan_slurm("cancel", "unreleased")
    assert queue(cluster, "unreleased") == []


def test_what_was_killed_before_it_had_a_job_gets_one(cluster: Cluster) -> None:
    killed(cluster, "before", "kill -9 $PPID", verb="ensure")
    assert cluster.status("before")["state"] == "created"
    assert cluster.titan_slurm("ensure", "before").stdout.startswith("submitted run before as job ")
    assert queue(cluster, "before") == ["before"]
    cluster.titan_slurm("cancel", "before")


def test_an_sbatch_that_outlives_its_caller_is_waited_for(cluster: Cluster) -> None:
    killed(cluster, "orphan", 'kill -9 $PPID; sleep 2; "$real" "$@"')
    assert " is queued as job " in cluster.titan_slurm("ensure", "orphan").stdout
    assert queue(cluster, "orphan") == ["orphan"]
    assert len(jobs_of(cluster, "orphan")) == 1
    cluster.titan_slurm("cancel", "orphan")


def test_each_end_of_a_run(cluster: Cluster) -> None:
    told = cluster.home / "told"
    notify = {"mail": "ada@lab.org", "command": ["cp", "/dev/stdin", str(told)]}
    by_name = {
        "finished": site(cluster, "finished", FINISH, notify=notify),
        "spent": (*site(cluster, "spent", "false"), "--set", "requeue.crashed=0"),
        # The batch script itself is killed: there is nobody left who could say why.
        "died": site(cluster, "died", "kill -9 $$"),
        "scancelled": (*HELD, "--name", "scancelled"),
    }
    for name, arguments in by_name.items():
        assert cluster.titan_slurm("ensure", *arguments).stdout.startswith(f"submitted run {name} as job ")
    cluster.run("scancel", *jobs_of(cluster, "scancelled"))
    for name in by_name:
        cluster.wait_for_end(name)

    def ensure(name: str) -> tuple[int, str]:
        done = cluster.titan_slurm("ensure", *by_name[name], check=False)
        return done.returncode, done.stdout + done.stderr

    assert ensure("finished") == (0, "run finished is finished: all 60 steps done\n")
    code, line = ensure("spent")
    assert (code, "has failed for good" in line, "[requeue] crashed = 0" in line) == (4, True, True)
    assert ensure("scancelled") == (
        3,
        "run scancelled was cancelled (Slurm says CANCELLED); "
        f"`titan-slurm resume {cluster.path('scancelled')}` goes on with it\n",
    )
    code, line = ensure("died")
    assert (code, line.startswith("submitted run died again as job ")) == (0, True)
    assert [len(jobs_of(cluster, name)) for name in by_name] == [1, 1, 2, 1]
    # And whoever is to be told has been.
    assert told.read_text().startswith("run finished has completed: all 60 steps done (job ")
    script = Path(cluster.path("finished") / "job.sh").read_text()
    assert "#SBATCH --mail-user=ada@lab.org" in script
