"""Which cluster profile a name means, and what is said of one that is not right."""

from pathlib import Path

import pytest

from tests.conftest import CommandLine
from titan_slurm.recipe import find

PROFILE = '[slurm]\npartition = "{}"\n'


def put(folder: Path, name: str = "hpc", partition: str = "gpu") -> Path:
    """A profile in one of the folders in which they are looked for."""
    path = folder / "clusters" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PROFILE.format(partition))
    return path


def partition(cli: CommandLine, *arguments: str, env: dict[str, str] | None = None) -> str:
    """The partition that a run would ask for; empty if none."""
    outcome = cli("render", "llama3_debug", *arguments, env=env)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith("#SBATCH --partition=")]
    return lines[0].partition("=")[2] if lines else ""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is /etc/titan-slurm in this test."""
    monkeypatch.setattr(find, "_SITE", tmp_path / "etc")
    return tmp_path / "etc"


def test_the_projects_profile_wins_over_the_users_and_the_sites(cli: CommandLine, site: Path, tmp_path: Path) -> None:
    put(site, partition="of-the-site")
    assert partition(cli, "--cluster", "hpc") == "of-the-site"
    put(tmp_path / "home" / ".config" / "titan-slurm", partition="of-the-user")
    assert partition(cli, "--cluster", "hpc") == "of-the-user"
    put(Path(), partition="of-the-project")
    assert partition(cli, "--cluster", "hpc") == "of-the-project"


def test_a_path_is_that_file(cli: CommandLine) -> None:
    put(Path())
    for name in ("clusters/hpc.toml", "./clusters/hpc.toml", str(Path("clusters/hpc.toml").absolute())):
        assert partition(cli, "--cluster", name) == "gpu"


def test_without_a_name_it_is_that_of_the_environment_and_then_the_default(cli: CommandLine) -> None:
    assert partition(cli) == ""
    put(Path(), "default", "of-default")
    put(Path(), "hpc", "of-hpc")
    assert partition(cli) == "of-default"
    assert partition(cli, env={"TITAN_SLURM_CLUSTER": "hpc"}) == "of-hpc"
    # Slurm by itself is still to be had.
    assert partition(cli, "--cluster", "slurm") == ""
    assert partition(cli, env={"TITAN_SLURM_CLUSTER": "slurm"}) == ""


def test_the_default_profile_is_not_for_machines_without_slurm(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(Path(), "default")
    monkeypatch.setenv("PATH", "/nonexistent")
    outcome = cli("submit", "llama3_debug", "--dry-run")
    assert outcome.code == 0
    assert "running on this machine" in outcome.err


@pytest.mark.parametrize(("option", "where"), [(True, "--cluster"), (False, "environment TITAN_SLURM_CLUSTER")])
def test_a_name_that_means_nothing(cli: CommandLine, option: bool, where: str) -> None:
    put(Path())
    given = ("--cluster", "hcp") if option else ()
    outcome = cli("render", "llama3_debug", *given, env={} if option else {"TITAN_SLURM_CLUSTER": "hcp"})
    assert outcome.code == 2
    assert outcome.errors == [f"{where}: there is no cluster 'hcp' (did you mean 'hpc'?)"]


def test_a_file_that_is_not_there(cli: CommandLine) -> None:
    outcome = cli("render", "llama3_debug", "--cluster", "./hpc.toml")
    assert outcome.code == 2
    assert outcome.errors == ["./hpc.toml: there is no such cluster profile, neither a file nor the name of one"]


# Each with the line at fault marked, in what would be the section [slurm].
MISTAKES = {
    'partitoin = "x" # here': "[slurm] has no field 'partitoin' (did you mean 'partition'?)",
    'partition = "" # here': "slurm.partition = '': must be one line of text, and not empty",
    'partition = "a\\nb" # here': "slurm.partition = 'a\\nb': must be one line of text, and not empty",
    "gpus = 8 # here": "[slurm] has no field 'gpus' (there is nodes.gpus)",
    'time = "1h" # here': "slurm.time = '1h': must be a time as sbatch takes it, e.g. 1-00:00:00",
    'gpu_request = "gpus" # here': "slurm.gpu_request = 'gpus': must be 'gpus-per-node', 'gres' or 'none'",
    'srun = ["rm -rf"] # here': "slurm.srun = ['rm -rf']: must be long options, each with its value, e.g. --mpi=none",
    'srun = ["--output=x"] # here': "slurm.srun = ['--output=x']: --output is set by titan-slurm itself",
    'sbatch.partition = "x" # here': "slurm.sbatch.partition = 'x': has a field of its own: slurm.partition",
    'sbatch.output = "x" # here': "slurm.sbatch.output = 'x': is set by titan-slurm itself",
    'sbatch.wc_key = "x" # here': "slurm.sbatch.wc_key = 'x': must be the long name of an option of sbatch, without "
    "dashes before it, e.g. wckey",
    '[nodes]\nmemory = "lots" # here': "nodes.memory = 'lots': must be a size as sbatch takes it, e.g. 500G",
    '[setup]\nvenv = "venv" # here': "setup.venv = 'venv': must be an absolute path",
    '[setup]\nmodules = ["a b"] # here': "setup.modules = ['a b']: must be one word, without a dash before it",
    '[environment]\n"A B" = "x" # here': "environment.A B = 'x': must be a variable's name",
    '[environment]\nMY_API_KEY = "x" # here': "environment.MY_API_KEY = 'x': looks like a secret, which the batch "
    "script would show; export it where you submit",
    '[container]\nmounts = ["/a"] # here': "container.image is missing",
    '[container]\nimage = "x"\nmounts = ["/a:/b:rx"] # here': "container.mounts = ['/a:/b:rx']: must be SOURCE, "
    "SOURCE:TARGET or SOURCE:TARGET:ro",
    '[paths]\nscratch = "/scratch/$NOT_SET" # here': "paths.scratch = '/scratch/$NOT_SET': names a variable that is "
    "not set here",
    '[network]\ninterface = "eth0 eth1" # here': "network.interface = 'eth0 eth1': must be names of network "
    "interfaces, e.g. eth0",
    "[cluster]\nschema = 2 # here": "cluster.schema = 2: must be 1",
    "[clutser] # here": "unknown section [clutser] (did you mean 'cluster'?)",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text.replace("\n", " "))
def test_a_mistake_is_one_line(cli: CommandLine, text: str) -> None:
    lines = ["[slurm]", *text.splitlines()]
    Path("hpc.toml").write_text("\n".join(lines))
    [at_fault] = [number for number, line in enumerate(lines, start=1) if line.endswith("# here")]
    outcome = cli("submit", "llama3_debug", "--cluster", "./hpc.toml", "--name", "mine")
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.errors == [f"hpc.toml:{at_fault}: {MISTAKES[text]}"]
    assert not Path("runs").exists()


def test_all_mistakes_are_told_at_once(cli: CommandLine) -> None:
    Path("hpc.toml").write_text('[slurm]\ntime = "x"\nmem = "x"\n[nodes]\ngpus = -1\n[network]\nefa = 1\n')
    outcome = cli("render", "llama3_debug", "--cluster", "./hpc.toml")
    assert sorted(error.split(": ")[0] for error in outcome.errors) == [f"hpc.toml:{line}" for line in (2, 3, 5, 7)]


def test_paths_are_those_of_whoever_submits(cli: CommandLine, tmp_path: Path) -> None:
    Path("hpc.toml").write_text(
        '[paths]\nscratch = "/scratch/$WHO"\nshared = ["~/data/"]\n[container]\nimage = "${WHERE}/a.sqsh"\n'
        'mounts = ["~", "/a:/b:ro"]\n'
    )
    outcome = cli("cluster", "show", "./hpc.toml", env={"WHO": "me", "WHERE": "/images"})
    assert outcome.code == 0, outcome.err
    home = tmp_path / "home"
    for text in (
        'scratch = "/scratch/me"',
        f'"{home}/data"',
        'image = "/images/a.sqsh"',
        f'"{home}:{home}"',
        '"/a:/b:ro"',
    ):
        assert text in outcome.out
