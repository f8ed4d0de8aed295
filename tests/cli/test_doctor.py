"""`doctor` where there is no Slurm, and what it says of folders, packages and wandb. The rest is in tests/slurm."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandLine
from titan_slurm.cluster.check import check
from titan_slurm.cluster.doctor import fits
from titan_slurm.cluster.profile import Profile, Settings
from titan_slurm.cluster.site import Site

FakeCommand = Callable[[str, str], Callable[[], list[str]]]


def test_without_slurm_it_says_so_and_looks_at_the_rest(cli: CommandLine) -> None:
    outcome = cli("doctor", "--json", env={"PATH": "/nonexistent", "WANDB_MODE": "offline"})
    assert outcome.code == 1
    findings = {each["name"]: each for each in json.loads(outcome.out)}
    assert findings["Slurm"]["level"] == "FAIL"
    assert findings["Slurm"]["what"].endswith(f"sinfo not on the PATH of {socket.gethostname()}")
    assert {name for name, each in findings.items() if each["level"] == "ok"} >= {"shared folder", "packages", "wandb"}
    # It leaves nothing behind.
    assert list(Path().iterdir()) == []


def test_a_job_is_not_tried_where_it_cannot_be(cli: CommandLine) -> None:
    outcome = cli("doctor", "--job", env={"PATH": "/nonexistent"})
    assert outcome.code == 1
    assert outcome.out.splitlines()[-1] == "warn job: not submitted — mend what fails above first"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "2"), "--nodes: says on how many nodes the job looks (with --job)"),
        (("--cluster", "local"), "--cluster: doctor looks at a Slurm site (a cluster profile, or slurm)"),
        (("--cluster", "nowhere"), "--cluster: there is no cluster 'nowhere' (known: local, slurm)"),
    ],
)
def test_bad_input(cli: CommandLine, arguments: tuple[str, ...], said: str) -> None:
    outcome = cli("doctor", *arguments)
    assert (outcome.code, outcome.errors, outcome.out) == (2, [said], "")


def test_a_key_for_wandb(cli: CommandLine, tmp_path: Path) -> None:
    def line(**environment: str) -> str:
        out = cli("doctor", env={"PATH": "/nonexistent"} | environment).out
        return next(line for line in out.splitlines() if " wandb: " in line)

    assert line().startswith("warn wandb: no key was found — `wandb login`, or export WANDB_API_KEY")
    assert line(WANDB_MODE="disabled") == "ok   wandb: disabled"
    assert line(WANDB_API_KEY="x" * 40) == "ok   wandb: a key is in the environment"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    found = line(NETRC=str(netrc))
    assert found == f"ok   wandb: a key for api.wandb.ai is in {netrc}"
    assert line(NETRC=str(netrc), WANDB_BASE_URL="https://wandb.example.org").startswith("warn wandb: ")


@pytest.mark.parametrize(
    ("of_profile", "of_environment", "said"),
    [
        ("auto", "offline", "offline: "),
        ("auto", "dryrun", "offline: "),
        ("auto", "disabled", "disabled"),
        ("auto", "", "no key was found"),
        # As in the run, the environment has a say only where nobody else says anything.
        ("online", "disabled", "no key was found"),
        ("offline", "online", "offline: "),
        ("disabled", "online", "disabled"),
    ],
)
def test_wandb_is_looked_at_as_the_run_will_use_it(
    cli: CommandLine, of_profile: str, of_environment: str, said: str
) -> None:
    Path("clusters").mkdir()
    Path("clusters/hpc.toml").write_text(f'[wandb]\nmode = "{of_profile}"\n')
    environment = {"PATH": "/nonexistent", "WANDB_MODE": of_environment}
    out = cli("doctor", "--cluster", "hpc", env=environment).out
    [line] = [line for line in out.splitlines() if " wandb: " in line]
    assert line.partition(" wandb: ")[2].startswith(said)


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.14.1", ">=2.14,<2.15", True),
        ("2.14.1+cu130", "<2.15,>=2.14", True),
        ("2.15.0", ">=2.14,<2.15", False),
        ("2.9.1", ">=2.14", False),
        ("0.3.0rc1", ">=0.3.0,<0.4", True),
    ],
)
def test_versions_within_bounds(version: str, wanted: str, expected: bool) -> None:
    assert fits(version, wanted) == expected


def test_modules_and_conda_are_loaded_as_the_batch_script_does(fake_command: FakeCommand) -> None:
    def advice(**setup: object) -> list[str]:
        profile = Profile("hpc", "hpc.toml", Settings.model_validate({"setup": setup}), {})
        found = check(profile, Site({}, {}, None, None, []))
        return [each.advice for each in found if each.what.startswith(("module load", "conda activate"))]

    loaded = fake_command("module", 'if [ "$2" = "it\'s" ]; then echo "no module it\'s" >&2; exit 1; fi')
    assert advice(modules=["cuda/13.0", "nccl"]) == [""]
    assert loaded() == ["load cuda/13.0", "load nccl"]
    assert advice(modules=["cuda/13.0", "it's"]) == ["no module it's"]
    fake_command("conda", 'if [ "$1" = activate ]; then echo "no such environment" >&2; exit 1; fi')
    assert advice(conda="mine") == ["no such environment"]
