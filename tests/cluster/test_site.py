"""What is made of what Slurm says of itself: a profile to edit, and a profile held against the site. The answers are
Slurm 22.05's, here for sites that no test cluster can be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from tests.conftest import CommandLine
from titan_slurm.cluster.site import parse_gpus, seconds

FakeCommand = Callable[[str, str], Callable[[], list[str]]]

CONFIG = """\
Configuration data as of 2026-11-22T19:08:54
AccountingStorageEnforce = {enforce}
ClusterName             = hpc
GresTypes               = {gres}
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptType             = {preempt}
SelectType              = {select}
SLURM_VERSION           = 22.05.8
"""
PARTITIONS = """\
PartitionName=debug AllowAccounts=ALL AllowQos=ALL Default=YES DefaultTime=NONE GraceTime=0 MaxTime=01:00:00 \
PreemptMode=OFF State=UP TotalNodes=2
PartitionName=gpu AllowAccounts=lab,other DenyAccounts= AllowQos=ALL Default=NO DefaultTime=01:00:00 GraceTime=60 \
MaxTime=2-00:00:00 PreemptMode=REQUEUE State=UP TotalNodes=20
PartitionName=old AllowAccounts=ALL AllowQos=normal Default=NO DefaultTime=NONE GraceTime=0 MaxTime=UNLIMITED \
PreemptMode=CANCEL State=DOWN TotalNodes=4
"""
NODES = """\
debug|2|32|128000|(null)|(null)|idle
gpu|15|192|2000000|gpu:h100:8(S:0-1)|ib,hopper|mixed
gpu|1|192|2000000|gpu:h100:8(S:0-1)|ib,hopper|drained
gpu|4|96|1000000|gpu:a100:4|ib,ampere|idle
old|4|40|384000|gpu:4|(null)|down*
"""


@pytest.fixture
def slurm(fake_command: FakeCommand) -> Callable[..., None]:
    """`slurm(gres=…, select=…, …)`: Slurm's commands, which say that the site is so."""

    def make(
        gres: str = "gpu",
        select: str = "select/cons_tres",
        preempt: str = "preempt/partition_prio",
        enforce: str = "associations,limits,qos",
        accounts: str | None = "lab\nlab\nproject\n",
    ) -> None:
        config = CONFIG.format(gres=gres, select=select, preempt=preempt, enforce=enforce)
        answers = f"""case "$*" in
            *config*) cat <<'END'\n{config}END\n;;
            *partition*) cat <<'END'\n{PARTITIONS}END\n;;
            *ping*) echo 'Slurmctld(primary) at head is UP' ;;
            *) echo 'ReservationName=maintenance StartTime=2026-11-22T19:08:54' ;;
        esac"""
        fake_command("scontrol", answers)
        fake_command("sinfo", f"cat <<'END'\n{NODES}END")
        known = f"""case "$*" in *assoc*) cat <<'END'\n{accounts}END\n;; *) echo normal; echo long ;; esac"""
        fake_command("sacctmgr", "exit 1" if accounts is None else known)
        start = "sbatch: Job 7 to start at 2026-11-23T01:02:03 using 8 processors on nodes n1"
        fake_command("sbatch", f"echo '{start}' >&2")

    return make


def init(cli: CommandLine, *arguments: str) -> tuple[str, dict[str, object]]:
    """The text of the profile that `cluster init` makes, and its tables."""
    outcome = cli("cluster", "init", "mine", "here.toml", *arguments)
    assert outcome.code == 0, outcome.err
    text = Path("here.toml").read_text()
    Path("here.toml").unlink()
    return text, tomli.loads(text)


def test_init_takes_the_partition_with_gpus(cli: CommandLine, slurm: Callable[..., None]) -> None:
    slurm()
    text, tables = init(cli)
    assert tables["slurm"] == {"partition": "gpu", "gpu_request": "gpus-per-node"}
    assert tables["nodes"] == {"gpus": 8, "gpu_type": "h100", "cpus": 192, "memory": "2000000M"}
    assert "gpu: 16 nodes with 8 h100 GPUs, 4 nodes with 4 a100 GPUs; at most 2-00:00:00; preempted by REQUEUE" in text
    assert "with 60 s of grace" in text
    assert "# Not all nodes are like this: 16 nodes with 8 h100 GPUs, 4 nodes with 4 a100 GPUs." in text
    assert (
        "old: down; 4 nodes with 4 GPUs; no time limit; preempted by CANCEL without grace: SIGKILL comes 30 s" in text
    )
    assert "jobs need one; yours: lab, project" in text
    assert "there are: normal, long" in text
    assert "jobs without it get 01:00:00" in text


def test_init_for_a_partition(cli: CommandLine, slurm: Callable[..., None]) -> None:
    slurm()
    _, tables = init(cli, "--partition", "old")
    assert tables["nodes"] == {"gpus": 4, "cpus": 40, "memory": "384000M"}
    outcome = cli("cluster", "init", "mine", "here.toml", "--partition", "gpus")
    assert outcome.code == 2
    assert outcome.errors == ["--partition: there is no partition 'gpus' (did you mean 'gpu'?)"]
    assert not Path("here.toml").exists()


@pytest.mark.parametrize(
    ("site", "request_"),
    [({"gres": "(null)"}, "none"), ({"select": "select/cons_res"}, "gres"), ({}, "gpus-per-node")],
)
def test_init_asks_for_gpus_as_the_site_can(
    cli: CommandLine, slurm: Callable[..., None], site: dict[str, str], request_: str
) -> None:
    slurm(**site)
    _, tables = init(cli)
    assert tables["slurm"]["gpu_request"] == request_  # type: ignore[index]


def test_init_without_accounting(cli: CommandLine, slurm: Callable[..., None]) -> None:
    slurm(accounts=None, enforce="none", preempt="preempt/none")
    text, _ = init(cli)
    assert "Accounting does not answer here" in text
    assert text.count("not preempted") == 3


def test_init_writes_to_the_users_folder_and_over_nothing(
    cli: CommandLine, slurm: Callable[..., None], tmp_path: Path
) -> None:
    slurm()
    outcome = cli("cluster", "init")
    made = tmp_path / "home" / ".config" / "titan-slurm" / "clusters" / "hpc.toml"
    assert outcome.out == f"{made}\n"
    before = made.read_text()
    outcome = cli("cluster", "init")
    assert outcome.code == 2
    assert outcome.errors == [f"{made}: exists already"]
    assert made.read_text() == before
    listed = cli("cluster", "list").out.splitlines()
    assert listed[1].split()[:5] == ["hpc", "user", "gpu", "8", "base"]


@pytest.mark.parametrize("name", ["slurm", "a/b", ".."])
def test_init_refuses_a_name_that_could_not_be_used(cli: CommandLine, slurm: Callable[..., None], name: str) -> None:
    slurm()
    assert cli("cluster", "init", name).code == 2


def test_init_where_slurm_does_not_answer(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("scontrol", "exit 1")
    outcome = cli("cluster", "init")
    assert outcome.code == 2
    assert outcome.errors == [
        "Slurm does not answer here (`sinfo` shows what is wrong; a profile is made where it works)"
    ]


def wrong(cli: CommandLine, text: str) -> list[str]:
    """What `cluster check` says is wrong with a profile."""
    Path("hpc.toml").write_text(text)
    outcome = cli("cluster", "check", "./hpc.toml")
    lines = outcome.out.splitlines()
    assert outcome.code == (1 if any(line.startswith("wrong ") for line in lines) else 0), outcome.err
    assert all(line.startswith(("ok    ", "wrong ")) for line in lines)
    return [line.removeprefix("wrong ") for line in lines if line.startswith("wrong ")]


def test_a_profile_that_is_right(cli: CommandLine, slurm: Callable[..., None]) -> None:
    slurm()
    text, _ = init(cli)
    assert wrong(cli, text) == []
    more = 'account = "lab"\nqos = "long"\nconstraint = "ib&hopper"\nreservation = "maintenance"\ntime = "1-00:00:00"\n'
    assert wrong(cli, text.replace('partition = "gpu"\n', f'partition = "gpu"\n{more}')) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[slurm]\npartition = "gpus"', "partition gpus: there is none; did you mean 'gpu'?"),
        ('[slurm]\npartition = "old"', "partition old is DOWN: choose another, or wait until it is up"),
        ('[slurm]\npartition = "gpu"\naccount = "lbb"', "account lbb: not known; did you mean 'lab'?"),
        (
            '[slurm]\npartition = "gpu"\naccount = "project"',
            "account project in partition gpu: not allowed there; allowed: lab,other",
        ),
        ('[slurm]\nqos = "lonng"', "qos lonng: not known; did you mean 'long'?"),
        ('[slurm]\npartition = "old"\nqos = "long"', "qos long in partition old: not allowed there; allowed: normal"),
        (
            '[slurm]\npartition = "gpu"\nconstraint = "hoper"',
            "constraint hoper: no node has it; did you mean 'hopper'?",
        ),
        ('[slurm]\nreservation = "x"', "reservation x: there is none now; there are: maintenance"),
        (
            '[slurm]\npartition = "gpu"\ngpu_request = "none"',
            'gpu_request none: jobs must ask for GPUs here: "gpus-per-node"',
        ),
        (
            '[slurm]\npartition = "gpu"\n[nodes]\ngpus = 16',
            "16 GPUs in a node: 0 nodes of partition gpu, 0 of them up: none has as many; there are 16 nodes with 8 "
            "h100 GPUs; 4 nodes with 4 a100 GPUs",
        ),
        (
            '[slurm]\npartition = "gpu"\n[nodes]\ngpus = 8\ngpu_type = "a100"',
            "8 a100 GPUs in a node: 0 nodes of partition gpu, 0 of them up: none has as many; there are 16 nodes "
            "with 8 h100 GPUs; 4 nodes with 4 a100 GPUs",
        ),
        ("[nodes]\ncpus = 64", "64 CPUs in a node of partition debug: no node of partition debug has more than 32"),
        (
            '[nodes]\nmemory = "1T"',
            "1.04858e+06 MB of memory in a node of partition debug: no node of partition debug has more than 128000",
        ),
        ('[slurm]\ntime = "2:00:00"', "time 2:00:00 in partition debug: partition debug allows 01:00:00"),
        ('[slurm]\ntime = "2"', "signal_lead 120 s before the limit: must be shorter than the time limit 2"),
        (
            '[slurm]\npartition = "old"',
            "jobs in partition old are preempted by CANCEL without grace: SIGKILL comes 30 s after SIGTERM: a "
            "preempted run does not come back by itself here; ask for GraceTime",
        ),
        ('[paths]\nshared = ["/no/such"]', "paths.shared: there is no folder /no/such: make it, or name another"),
        ('[setup]\nvenv = "/no/such"', "setup.venv: there is no /no/such/bin/python: make it, or name another"),
        (
            '[container]\nimage = "/no/such.sif"\n[cluster]\ntemplate = "apptainer_modules"',
            "container.image: there is no /no/such.sif: make it, or name another",
        ),
        ('[container]\nimage = "x"', "the batch script of a small job: "),
        ('[cluster]\ntemplate = "plian"', "did you mean 'plain'?"),
    ],
)
def test_what_is_not_right_is_said_with_what_to_do(
    cli: CommandLine, slurm: Callable[..., None], text: str, said: str
) -> None:
    slurm()
    assert any(said in line for line in wrong(cli, text)), cli("cluster", "check", "./hpc.toml").out


def test_accounts_that_nobody_enforces(cli: CommandLine, slurm: Callable[..., None]) -> None:
    slurm(enforce="none")
    assert wrong(cli, '[slurm]\naccount = "anything"\nqos = "anything"') == []
    slurm(accounts=None)
    assert wrong(cli, '[slurm]\naccount = "anything"') == []


def test_what_sbatch_refuses_is_said(cli: CommandLine, slurm: Callable[..., None], fake_command: FakeCommand) -> None:
    slurm()
    fake_command("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid wckey' >&2; exit 1")
    assert wrong(cli, "") == ["sbatch, of a small job: Batch job submission failed: Invalid wckey"]


def test_no_profile_to_check(cli: CommandLine) -> None:
    outcome = cli("cluster", "check")
    assert outcome.code == 2
    [error] = outcome.errors
    assert error.startswith("no cluster profile is named")


def test_a_profile_that_is_not_valid_is_listed_as_that(cli: CommandLine) -> None:
    Path("clusters").mkdir()
    Path("clusters/bad.toml").write_text("[slurm]\nx = 1\n")
    outcome = cli("cluster", "list")
    assert outcome.code == 0
    assert "clusters/bad.toml is not valid" in outcome.err
    assert outcome.out.startswith("no cluster profiles")


def test_gpus_of_a_node() -> None:
    assert parse_gpus("gpu:h100:8(S:0-1),nvme:1") == {"h100": 8}
    assert parse_gpus("gpu:a100:4(S:0),gpu:a100:4(S:1),gpu:v100:1") == {"a100": 8, "v100": 1}
    assert parse_gpus("gpu:4") == {"": 4}
    assert parse_gpus("(null)") == {}
    assert parse_gpus("mygpu:4") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:00:01", 7201),
        ("1-00", 86400),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limits(text: str, expected: int) -> None:
    assert seconds(text) == expected


START = "sbatch: Job 7 to start at 2026-11-23T01:02:03 using 8 processors on nodes n1 in partition low"
REFUSAL = "sbatch: error: invalid account"


@pytest.mark.parametrize("verb", ["validate", "submit"])
def test_slurm_is_asked_when_a_job_would_start(cli: CommandLine, fake_command: FakeCommand, verb: str) -> None:
    fake_command(
        "sbatch", f"if [ \"$1\" = --test-only ]; then echo '{START}' >&2; else echo 'Submitted batch job 8'; fi"
    )
    outcome = cli(verb, "llama3_debug", "--cluster", "slurm")
    assert outcome.code == 0, outcome.err
    assert "note: would start at 2026-11-23T01:02:03, by Slurm's estimate\n" in outcome.err


def test_what_slurm_would_not_take_is_not_valid(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("scontrol", "echo 'Slurmctld(primary) at head is UP'")
    fake_command("sbatch", f"echo '{REFUSAL}' >&2; exit 1")
    outcome = cli("validate", "llama3_debug", "--cluster", "slurm")
    assert (outcome.code, outcome.errors) == (2, ["sbatch --test-only: invalid account"])


def test_what_slurm_lets_wait_is_submitted(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("scontrol", "echo 'Slurmctld(primary) at head is UP'")
    refuse = f"echo '{REFUSAL}' >&2; exit 1"
    fake_command("sbatch", f"if [ \"$1\" = --test-only ]; then {refuse}; else echo 'Submitted batch job 8'; fi")
    outcome = cli("submit", "llama3_debug", "--cluster", "slurm")
    assert outcome.code == 0
    assert "note: Slurm cannot say when it would start: invalid account\n" in outcome.err


@pytest.mark.parametrize("answer", ["exit 1", "echo 'Slurmctld(primary) at head is DOWN'"])
def test_a_slurm_that_does_not_answer_has_no_say(cli: CommandLine, fake_command: FakeCommand, answer: str) -> None:
    fake_command("scontrol", answer)
    fake_command("sbatch", "echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1")
    outcome = cli("validate", "llama3_debug", "--cluster", "slurm")
    assert outcome.code == 0, outcome.err
    assert "start" not in outcome.err
