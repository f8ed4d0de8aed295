"""Recipe × cluster profile: who wins, what is refused, and what a run keeps."""

import json
from pathlib import Path

import pytest
import tomli

from tests.conftest import CommandLine, Outcome
from tests.launch.test_script import directives
from titan_slurm.cli import options
from titan_slurm.launch import create
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.nodes import blame

HPC = """\
[slurm]
partition = "of-the-profile"
account = "of-the-profile"
qos = "of-the-profile"
constraint = "of-the-profile"
cpus_per_task = 3
srun = ["--mpi=none"]
sbatch.wckey = "of-the-profile"
sbatch.switches = 1
[wandb]
mode = "offline"
"""


def put(text: str, name: str = "hpc") -> None:
    """A profile of the project."""
    Path("clusters").mkdir(exist_ok=True)
    Path(f"clusters/{name}.toml").write_text(text)


def recipe(text: str) -> str:
    """A recipe on top of the debug one."""
    Path("mine.toml").write_text(f'[recipe]\nextends = "llama3_debug"\n{text}\n')
    return "mine.toml"


def made(recipe: str, cluster: str) -> RunDirectory:
    """A run in its directory, as it is before sbatch is called."""
    prepared = options.prepare(recipe, None, [], cluster, "mine", None)
    prepared.run.path.parent.mkdir(exist_ok=True)
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    return prepared.run


def submitted(cli: CommandLine, recipe: str, *arguments: str) -> Outcome:
    """The outcome of a submission where there is no sbatch."""
    return cli("submit", recipe, "--cluster", "hpc", "--name", "mine", *arguments, env={"PATH": "/nonexistent"})


def test_command_line_environment_recipe_profile_default(cli: CommandLine) -> None:
    put(HPC)
    text = '[slurm]\naccount = "of-the-recipe"\nqos = "of-the-recipe"\nconstraint = "of-the-recipe"\n'
    environment = {"SBATCH_QOS": "of-the-environment", "SBATCH_CONSTRAINT": "of-the-environment"}
    setting = "slurm.constraint=of-the-command-line"
    given = ("--cluster", "hpc", "--set", setting, "--name", "mine")
    outcome = cli("render", recipe(text), *given, env=environment)
    assert outcome.code == 0, outcome.err
    words = directives(outcome.out)
    for option, origin in (
        ("constraint", "command-line"),
        ("qos", "environment"),
        ("account", "recipe"),
        ("partition", "profile"),
    ):
        assert f"--{option}=of-the-{origin}" in words
    assert "--signal=USR2@120" in words
    assert "note: slurm.qos = 'of-the-environment' comes from the environment SBATCH_QOS\n" in outcome.err


@pytest.mark.usefixtures("clean_environment")
def test_the_plan_says_where_each_value_came_from() -> None:
    put(HPC)
    run = made(recipe('[slurm]\naccount = "of-the-recipe"\n'), "hpc")
    plan = json.loads(run.plan_file.read_text())
    values = plan["values"]
    assert values["slurm.account"] == {"value": "of-the-recipe", "from": "mine.toml:4"}
    assert values["slurm.partition"]["from"].endswith("clusters/hpc.toml:2")
    assert values["slurm.sbatch.wckey"]["from"].endswith("clusters/hpc.toml:8")
    assert values["cluster.slurm.account"]["value"] == "of-the-profile"
    assert values["cluster.slurm.srun"]["value"] == ["--mpi=none"]
    assert (plan["slurm"]["cpus_per_task"], plan["wandb"]["mode"]) == (3, "offline")


def test_extra_options_are_put_together(cli: CommandLine) -> None:
    put(HPC)
    more = '[slurm.sbatch]\nwckey = false\nmail-type = "END"\nhold = true\n'
    text = recipe('[slurm]\nsrun = ["--cpu-bind=none", "--label"]\n' + more)
    outcome = cli("render", text, "--cluster", "hpc")
    words = directives(outcome.out)
    assert [word for word in words if word.startswith(("--wckey", "--switches", "--mail-type", "--hold"))] == [
        "--switches=1",
        "--mail-type=END",
        "--hold",
    ]
    [launch] = [line for line in outcome.out.splitlines() if line.startswith("srun ")]
    assert launch.endswith("--mpi=none --cpu-bind=none --label \\")


def test_an_exclusion_of_ones_own_joins_that_of_bad_nodes(cli: CommandLine) -> None:
    run = made(recipe('[slurm]\nsbatch.exclude = "n[1-2],n7"\n'), "slurm")
    assert "--exclude=n[1-2],n7" in directives(run.script_file.read_text())
    for attempt in (1, 2):
        blame(run, ["n9"], attempt, "crashed", None)
    again = cli("submit", run.recipe_file, "--name", "mine", "--resume", "--dry-run")
    assert "--exclude=n[1-2],n7,n9" in directives(again.out)


@pytest.mark.parametrize(
    ("request_", "gpus", "expected"),
    [
        ("gpus-per-node", "", ["--gpus-per-node=2"]),
        ("gpus-per-node", 'gpu_type = "h100"', ["--gpus-per-node=h100:2"]),
        ("gres", "", ["--gres=gpu:2"]),
        ("gres", 'gpu_type = "h100"', ["--gres=gpu:h100:2"]),
        ("none", 'gpu_type = "h100"', []),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants(cli: CommandLine, request_: str, gpus: str, expected: list[str]) -> None:
    put(f'[slurm]\ngpu_request = "{request_}"\n[nodes]\ngpus = 2\n{gpus}\n')
    text = "[slurm]\ngpus_per_node = 2\ntasks_per_node = 2\n"
    words = directives(cli("render", recipe(text), "--cluster", "hpc").out)
    assert [word for word in words if word.startswith(("--gpu", "--gres"))] == expected


def test_other_gres_are_asked_for_with_the_gpus(cli: CommandLine) -> None:
    put('[slurm]\ngpu_request = "gres"\nsbatch.gres = "nvme:1"\n')
    text = "[slurm]\ngpus_per_node = 2\ntasks_per_node = 2\n"
    assert "--gres=gpu:2,nvme:1" in directives(cli("render", recipe(text), "--cluster", "hpc").out)


def test_the_profile_says_how_many_gpus_a_recipe_uses_that_does_not(cli: CommandLine) -> None:
    put("[nodes]\ngpus = 4\n")
    Path("mine.toml").write_text(
        '[model]\nflavor = "debugmodel"\n[training]\ngradient_accumulation_steps = 1\n[slurm]\nnodes = 2\n'
    )
    outcome = cli("render", "mine.toml", "--cluster", "hpc")
    assert outcome.code == 0, outcome.err
    assert {"--ntasks-per-node=4", "--gpus-per-node=4"} <= set(directives(outcome.out))


def test_what_a_site_refuses_is_never_sent_and_it_is_said(cli: CommandLine) -> None:
    put('[slurm]\nrefused = ["mem", "exclusive", "comment"]\n')
    outcome = cli("render", recipe('[slurm]\nmem = "500G"\nexclusive = true\n'), "--cluster", "hpc")
    words = directives(outcome.out)
    assert not any(word.startswith(("--mem", "--exclusive", "--comment")) for word in words)
    notes = [line for line in outcome.err.splitlines() if "is not asked for" in line]
    assert [note.split(" ")[1] for note in notes] == ["slurm.mem", "slurm.exclusive"]
    assert all("clusters/hpc.toml:2" in note for note in notes)


@pytest.mark.parametrize(
    ("profile", "text", "said"),
    [
        (
            "[nodes]\ngpus = 4",
            "gpus_per_node = 8",
            "slurm.gpus_per_node: 8 GPUs are asked for, and the nodes of cluster hpc have 4",
        ),
        (
            '[nodes]\ngpu_type = "h100"',
            'gpus_per_node = 2\ngpu_type = "a100"',
            "slurm.gpu_type: 'a100' is asked for, and the nodes of cluster hpc have h100",
        ),
        (
            "[nodes]\ncpus = 8",
            "cpus_per_task = 5",
            "slurm.cpus_per_task: 2 tasks × 5 CPUs are asked for, and the nodes of cluster hpc have 8",
        ),
        (
            '[nodes]\nmemory = "1000M"',
            'mem = "1G"',
            "slurm.mem: 1G is asked for, and the nodes of cluster hpc have 1000M",
        ),
    ],
)
def test_more_than_a_node_has_is_refused(cli: CommandLine, profile: str, text: str, said: str) -> None:
    put(profile)
    outcome = submitted(cli, recipe(f"[slurm]\n{text}"))
    assert outcome.code == 2
    [error] = outcome.errors
    line = 3 + len(text.splitlines())
    assert error.startswith(f"mine.toml:{line}: {said} (")
    assert error.endswith("clusters/hpc.toml:2)")


def test_a_run_must_be_where_all_nodes_see_it(cli: CommandLine, tmp_path: Path) -> None:
    put(f'[paths]\nshared = ["{tmp_path}/shared"]\n')
    (tmp_path / "shared").mkdir()
    outcome = submitted(cli, "llama3_debug")
    [error] = outcome.errors
    assert error.startswith(f"--runs-dir: {Path('runs/mine').absolute()} is not on a file system that all nodes share")
    outcome = submitted(cli, "llama3_debug", "--runs-dir", str(tmp_path / "shared"))
    assert outcome.errors == ["--cluster slurm: sbatch is not on the PATH of this machine"]


def test_a_template_that_is_not_there_is_said_where_it_is_named(cli: CommandLine) -> None:
    put('[cluster]\ntemplate = "pyxis"\n')
    outcome = cli("render", "llama3_debug", "--cluster", "hpc")
    assert outcome.code == 2
    [error] = outcome.errors
    assert "clusters/hpc.toml:2: pyxis: there is no such template" in error
    assert error.endswith("(did you mean 'pyxis_efa'?)")


def test_a_run_goes_on_at_the_place_where_it_was(cli: CommandLine) -> None:
    put(HPC)
    run = made("llama3_debug", "hpc")
    # What a profile says is left to the place where the recipe runs next.
    kept = tomli.loads(run.recipe_file.read_text())
    assert "partition" not in kept["slurm"]
    put(HPC.replace("of-the-profile", "changed"))
    again = ("submit", str(run.recipe_file), "--name", "mine", "--resume", "--dry-run")
    outcome = cli(*again)
    assert outcome.code == 0, outcome.err
    assert "--partition=of-the-profile" in directives(outcome.out)
    assert "--mpi=none" in outcome.out
    # Unless another place is named, or the same one as it is now.
    assert "--partition=changed" in directives(cli(*again, "--cluster", "hpc").out)
    assert not any(word.startswith("--partition") for word in directives(cli(*again, "--cluster", "slurm").out))


@pytest.mark.usefixtures("clean_environment")
def test_extra_options_of_a_recipe_stay_in_it() -> None:
    run = made(recipe('[slurm]\nsbatch.mail-type = "END"\nsrun = ["--label"]\n'), "slurm")
    kept = tomli.loads(run.recipe_file.read_text())["slurm"]
    assert (kept["sbatch"], kept["srun"]) == ({"mail-type": "END"}, ["--label"])


def test_sbatch_is_called_without_what_would_win_over_the_script(cli: CommandLine, tmp_path: Path) -> None:
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "sbatch").write_text(f"#!/bin/bash\nenv > {tmp_path}/environment\necho 'Submitted batch job 7'\n")
    (fakes / "sbatch").chmod(0o755)
    environment = {
        "PATH": f"{fakes}:/usr/bin:/bin",
        "SBATCH_PARTITION": "elsewhere",
        "SBATCH_SIGNAL": "TERM@1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_WCKEY": "site",
    }
    outcome = cli("submit", "llama3_debug", "--cluster", "slurm", "--set", "slurm.partition=here", env=environment)
    assert outcome.code == 0, outcome.err
    seen = (tmp_path / "environment").read_text()
    assert [line for line in seen.splitlines() if line.startswith("SBATCH_")] == ["SBATCH_WCKEY=site"]
