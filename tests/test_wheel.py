"""An installed titan-slurm has its recipes and templates with it. An unpacked wheel stands in for one that is installed
into an empty environment, which would take minutes: torch comes along."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Outcome


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    # Where the build backend is not installed, build fetches it into an environment of its own.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    build = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, REPOSITORY]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("titan_slurm-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def installed(unpacked: Path, statement: str, *arguments: str) -> Outcome:
    """Run Python with the unpacked wheel before everything else, also before the clone that may be installed."""
    command = [sys.executable, "-c", statement, *arguments]
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return Outcome(done.returncode, done.stdout, done.stderr)


RUN = "from titan_slurm.cli import main; main()"
RUN_AND_LOOK = """
import atexit, sys
import titan_slurm
atexit.register(lambda: print(titan_slurm.__file__, "torch" in sys.modules, file=sys.stderr))
from titan_slurm.cli import main
main()
"""


def test_the_wheel_has_what_the_repository_shows(unpacked: Path) -> None:
    for folder in ("recipes", "templates"):
        files = {path.name for path in (REPOSITORY / folder).iterdir()}
        assert {path.name for path in (unpacked / "titan_slurm" / "share" / folder).iterdir()} == files
    for name in ("py.typed", "recipe/torchtitan.json", "report/report.html.j2", "train/rank.py"):
        assert (unpacked / "titan_slurm" / name).is_file()
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"titan_slurm"}
    [metadata] = unpacked.glob("titan_slurm-*.dist-info")
    assert "titan-slurm = titan_slurm.cli:main" in (metadata / "entry_points.txt").read_text()
    assert (metadata / "licenses" / "LICENSE").is_file()


@pytest.mark.usefixtures("clean_environment")
def test_its_recipes_are_found(unpacked: Path) -> None:
    outcome = installed(unpacked, RUN, "recipes", "list")
    assert outcome.code == 0, outcome.err
    assert {row.split()[0] for row in outcome.out.splitlines()[1:]} >= {"llama3_8b", "llama3_debug"}
    outcome = installed(unpacked, RUN, "validate", "recipes/llama3_debug.toml")
    assert f"built-in, {unpacked}/titan_slurm/share/recipes/llama3_debug.toml" in outcome.err


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_a_dry_run_needs_neither_the_clone_nor_torch(unpacked: Path, clean_environment: Path, cluster: str) -> None:
    outcome = installed(unpacked, RUN_AND_LOOK, "submit", "llama3_debug", "--dry-run", "--cluster", cluster)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("#!/bin/bash\n")
    assert outcome.err.splitlines()[-1] == f"{unpacked}/titan_slurm/__init__.py False"
    assert str(REPOSITORY) not in outcome.out + outcome.err
    assert list(clean_environment.iterdir()) == []
