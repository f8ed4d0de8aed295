"""The templates that come with titan-slurm, and what a shell makes of the strings of a profile and a recipe."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from tests.conftest import REPOSITORY, CommandLine
from tests.launch.test_script import AWKWARD, BASH, template
from titan_slurm.cli import options
from titan_slurm.cluster.profile import SECTIONS, Settings, load
from titan_slurm.cluster.state import status
from titan_slurm.errors import BadInputError
from titan_slurm.fields import field_names
from titan_slurm.launch.submit import Prepared
from titan_slurm.recipe.schema import sections
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_json

MORE = ("a\nb", "a\ntouch pwned\n", "\x1b[31m", "{{ 7 * 7 }}", "a,/etc:/etc", "%j%%", "")
BEGINNINGS = ("", "-", "#", ";", "$", "`")
CONTAINER = {"cluster": {"template": ""}, "container": {"image": "registry#image:tag"}}


def put(tables: dict[str, Any]) -> Path:
    """A profile called hpc."""
    path = Path("clusters/hpc.toml").absolute()
    path.parent.mkdir(exist_ok=True)
    path.write_text(tomli_w.dumps(tables))
    return path


def made(recipe: str = "llama3_debug", name: str = "mine", runs: Path | None = None) -> RunDirectory:
    """A run of profile hpc, with what its batch script needs."""
    prepared = options.prepare(recipe, None, [], "hpc", name, runs)
    prepared.run.path.mkdir(parents=True)
    write_json(prepared.run.plan_file, prepared.plan.to_dict())
    prepared.run.script_file.write_text(prepared.script)
    return prepared.run


@dataclass(frozen=True)
class Site:
    """A machine on which the commands of a batch script only write down how they are called."""

    folder: Path

    def stand_in(self, name: str, then: str = "") -> None:
        """A command of that name; its arguments are kept, each ended by a NUL."""
        file = self.folder / name
        file.write_text(f"#!{BASH}\nprintf '%s\\0' \"$@\" > {self.folder}/{name}.$PPID.$$.called\n{then}\n")
        file.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call."""
        return [file.read_text().split("\0")[:-1] for file in sorted(self.folder.glob(f"{name}.*.called"))]

    def run(self, run: RunDirectory) -> subprocess.CompletedProcess[str]:
        """Run a batch script, in an empty folder."""
        (self.folder / "work").mkdir(exist_ok=True)
        environment = {"PATH": str(self.folder), "HOME": str(self.folder), "SLURM_JOB_ID": "7"}
        return subprocess.run(
            [BASH, run.script_file], capture_output=True, text=True, env=environment, cwd=self.folder / "work"
        )


@pytest.fixture
def site(tmp_path: Path, clean_environment: Path) -> Site:  # noqa: ARG001
    """With stand-ins for what a node has. The Python is the real one."""
    folder = tmp_path / "commands"
    folder.mkdir()
    made = Site(folder)
    for name in ("srun", "module", "conda"):
        made.stand_in(name)
    made.stand_in("python", f'exec {sys.executable} "$@"')
    # So that whatever a shell should run by mistake would work.
    (folder / "touch").symlink_to(shutil.which("touch") or "touch")
    return made


def leaves(kind: Any) -> Iterator[str]:
    """The fields of a section."""
    yield from (name for name in field_names(kind) if name != "root")


def shapes(section: str, text: str) -> Iterator[dict[str, Any]]:
    """Tables in which `text` stands in one place of a profile's section: each field, as it is and in a list, and where
    names are free also as a name."""
    for field in leaves(SECTIONS[section]):
        yield {field: text}
        yield {field: [text]}
    match section:
        case "environment":
            yield {"NAME": text}
            yield {text: "x"}
        case "slurm":
            yield {"sbatch": {"wckey": text}}
            yield {"sbatch": {text: "x"}}
            yield {"srun": [f"--mpi={text}"]}
        case "container":
            yield {"image": "x", "mounts": [f"/a{text}"]}
            yield {"image": "x", "mounts": [f"/a:/b{text}"]}
            yield {"image": "x", "python": text}
            yield {"image": f"/a{text}"}
        case "setup":
            yield {"venv": f"/a{text}"}
        case "paths":
            yield {"scratch": f"/a{text}"}
            yield {"shared": [f"/a{text}"]}


def merged(tables: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both, table by table; lists are put together."""
    result = dict(tables)
    for name, value in more.items():
        old = result.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            result[name] = merged(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            result[name] = old + value
        else:
            result[name] = value
    return result


def accepted(text: str) -> tuple[dict[str, Any], int]:
    """A profile with `text` in each place that does not refuse it, and in how many places that is."""
    whole: dict[str, Any] = {}
    count = 0
    for section in SECTIONS:
        for shape in shapes(section, text):
            with_this = merged(whole, {section: shape})
            try:
                Settings.model_validate(merged({"container": {"image": "x"}}, with_this))
            except ValidationError:
                continue
            whole, count = with_this, count + 1
    return whole, count


def usable(tables: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same profile with what it names to be found, so that its script comes to its end."""
    tables = merged(tables, {"cluster": {"template": "everything"}, "slurm": {"refused": []}})
    tables["nodes"] = {}
    tables.get("paths", {}).pop("shared", None)
    if "venv" in tables.get("setup", {}):
        venv = tmp_path / tables["setup"]["venv"].lstrip("/")
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "activate").touch()
        (venv / "bin" / "python").write_text(f'#!{BASH}\nexec {sys.executable} "$@"\n')
        (venv / "bin" / "python").chmod(0o755)
        tables["setup"]["venv"] = str(venv)
    if tables.get("container", {}).get("image", "").startswith("/"):
        image = tmp_path / tables["container"]["image"].lstrip("/")
        image.mkdir(parents=True, exist_ok=True)
        tables["container"]["image"] = str(image)
    return tables


# Every value that a template may use, and each in the two places where a string can go: a list and a directive.
EVERYTHING = """\
{% extends "titan_slurm/base.sbatch.j2" %}
{% set srun = srun + ["--container-image=" ~ container.image, "--container-mounts=" ~ container.mounts | join(",")] %}
{% set wrapper = ["apptainer", "exec", "--bind=" ~ container.mounts | join(","), container.image] %}
"""


@pytest.mark.parametrize("text", (*AWKWARD, *MORE), ids=repr)
def test_no_string_of_a_profile_runs_a_command(site: Site, tmp_path: Path, text: str) -> None:
    tables, count = accepted(text)
    one_line = text.isprintable() and text != ""
    # Free text: descriptions, and what Slurm, NCCL or the container runtime reads. The rest is refused at once.
    assert (count >= 12) == one_line, tables
    template(EVERYTHING, "everything.sbatch.j2")
    put(usable(merged({"container": {"image": "x"}}, tables), tmp_path))

    run = made()
    done = site.run(run)

    assert not list(tmp_path.rglob("pwned")), run.script_file.read_text()
    assert list((site.folder / "work").iterdir()) == []
    assert "command not found" not in done.stderr
    [words] = site.calls("srun")
    container = load(Path("clusters/hpc.toml"), "hpc").settings.container
    assert container is not None
    assert f"--container-image={container.image}" in words
    assert words[words.index("apptainer") + 3 : words.index("apptainer") + 5] == [container.image, container.python]
    if one_line:
        assert f"--mpi={text}" in words


def recipe_with(text: str) -> dict[str, Any]:
    """A recipe with `text` in each place of each section that takes it by itself."""
    whole: dict[str, Any] = {}
    for name, section in sections().items():
        if section is None:
            continue
        shapes = [shape for field in leaves(section) for shape in ({field: text}, {field: [text]})]
        if name == "slurm":
            shapes += [{"srun": [f"--mpi={text}"]}, {"sbatch": {"wckey": text}}, {"sbatch": {text: "x"}}]
        for shape in shapes:
            with_this = merged(whole.get(name, {}), shape)
            with contextlib.suppress(ValidationError):
                section.model_validate(with_this)
                whole[name] = with_this
    # Where a recipe finds another, and two that go with a third.
    whole["recipe"] = whole.get("recipe", {}) | {"extends": "llama3_debug"}
    return whole


def planned(recipe: dict[str, Any]) -> tuple[Prepared | None, dict[str, Any]]:
    """A run of a recipe, without the fields that do not fit the others, and what is left of it; None if no script can
    hold it. Folders that are not there do no harm to a script that is only shown."""
    for _ in range(20):
        Path("mine.toml").write_text(tomli_w.dumps(recipe))
        try:
            prepared = options.prepare("mine.toml", None, [], "hpc", "mine", None, only_show=True)
            assert prepared.script
        except BadInputError as error:
            text = "\n".join(map(str, error.problems))
            if "has a control character, which a batch script cannot hold" in text:
                return None, recipe
            named = [(name, field) for name, table in recipe.items() for field in table if f"{name}.{field}" in text]
            assert named, text
            for name, field in named:
                del recipe[name][field]
        else:
            return prepared, recipe
    pytest.fail("fields are left that fit no others")


@pytest.mark.parametrize("text", (*AWKWARD, *MORE), ids=repr)
def test_no_string_of_a_recipe_runs_a_command(site: Site, tmp_path: Path, text: str) -> None:
    template(EVERYTHING, "everything.sbatch.j2")
    put({"cluster": {"template": "everything"}, "container": {"image": "x"}})
    # As a path it also becomes a mount of the container.
    folder = tmp_path / "of_the_recipe" / f"a{text}"
    folder.mkdir(parents=True)
    calls = 0
    # What matters where it begins a word, or a line, is tried as it is too.
    for used in (text, str(folder)) if text[:1] in BEGINNINGS or not text.isprintable() else (str(folder),):
        prepared, recipe = planned(recipe_with(used))
        one_line = used.isprintable() and used != ""
        count = sum(map(len, recipe.values()))
        assert count >= 12 or not one_line, recipe
        if prepared is None:
            assert not one_line
            continue
        calls += 1
        prepared.run.path.mkdir(parents=True)
        write_json(prepared.run.plan_file, prepared.plan.to_dict())
        prepared.run.script_file.write_text(prepared.script)
        done = site.run(prepared.run)
        assert "command not found" not in done.stderr
        assert not list(tmp_path.rglob("pwned")), prepared.script
        shutil.rmtree(prepared.run.path)
    assert list((site.folder / "work").iterdir()) == []
    assert len(site.calls("srun")) == calls > 0


@pytest.mark.parametrize("text", (*AWKWARD, *MORE), ids=repr)
def test_no_name_of_a_run_runs_a_command(cli: CommandLine, text: str) -> None:
    outcome = cli("render", "llama3_debug", "--name", f"a{text}", "--cluster", "slurm")
    assert (outcome.code == 2) == (text not in ("", "-x")), outcome.err
    assert "pwned" not in outcome.out


def in_container(site: Site, tmp_path: Path, **settings: str) -> tuple[RunDirectory, list[str], list[str]]:
    """A run that starts its ranks in a container: the arguments of srun, and those mounts that are its own."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "shared").mkdir()
    (elsewhere / "tokenizer").mkdir()
    (elsewhere / "tokenizer" / "vocab.txt").touch()
    (elsewhere / "text.jsonl").touch()
    put(
        {
            "cluster": {"template": settings["template"]},
            "container": {
                "image": settings["image"],
                "mounts": ["/opt/tools:/tools:ro"],
                "python": "/opt/my env/python",
            },
            "paths": {"shared": [str(tmp_path / "shared")]},
            "slurm": {"srun": ["--mpi=none"]},
            "environment": {"NCCL_DEBUG": "WARN"},
        }
    )
    Path("mine.toml").write_text(
        '[recipe]\nextends = "llama3_debug"\n'
        f'[data]\ndataset = "text"\ndataset_path = "{elsewhere}/text.jsonl"\ntokenizer = "{elsewhere}/tokenizer"\n'
        f'[checkpointing]\nsave_dir = "{elsewhere}/to/come"\n'
    )
    run = made("mine.toml", runs=tmp_path / "shared" / "runs")
    site.run(run)
    [words] = site.calls("srun")
    mounts = ["/opt/tools:/tools:ro", f"{tmp_path}/shared:{tmp_path}/shared"]
    mounts += [f"{path}:{path}" for path in (f"{elsewhere}/text.jsonl", f"{elsewhere}/tokenizer", str(elsewhere))]
    return run, words, mounts


def check_outside(run: RunDirectory) -> None:
    """The batch script itself began and ended the attempt, with this Python."""
    [attempt] = run.attempts()
    verdict = attempt.verdict()
    assert verdict is not None
    assert verdict["verdict"] == "crashed"  # The stand-in trains nothing.


def test_pyxis_gets_image_mounts_and_command(site: Site, tmp_path: Path) -> None:
    run, words, mounts = in_container(site, tmp_path, template="pyxis_efa", image="registry#image:tag")
    given = [word for word in words if word.startswith("--container-mounts=")]
    assert sorted(given[0].removeprefix("--container-mounts=").split(",")) == sorted(mounts)
    variables, *after = words[words.index(given[0]) + 1 :]
    # What the image says of these does not count.
    assert variables == "--container-env=PYTHONPATH,PYTHONSAFEPATH,NCCL_DEBUG"
    assert after == ["/opt/my env/python", "-u", "-m", "submitit.core._submit", str(run.submitit_folder)]
    assert words[:2] == ["--kill-on-bad-exit=1", f"--output={run.attempts()[0].path}/rank_%t.log"]
    assert words[2:4] == ["--mpi=none", "--container-image=registry#image:tag"]
    assert "export FI_PROVIDER=efa" in run.script_file.read_text()
    check_outside(run)


def test_apptainer_gets_image_mounts_and_command(site: Site, tmp_path: Path) -> None:
    image = tmp_path / "my image.sif"
    image.touch()
    # As srun does, it starts the command, once here.
    site.stand_in("srun", 'while [[ "$1" == --* ]]; do shift; done; "$@"')
    site.stand_in("apptainer", f'echo "$TITAN_SLURM_ATTEMPT $PYTHONNOUSERSITE" > {site.folder}/environment')
    run, _, mounts = in_container(site, tmp_path, template="apptainer_modules", image=str(image))
    [[verb, bind, *rest]] = site.calls("apptainer")
    assert verb == "exec"
    assert sorted(bind.removeprefix("--bind=").split(",")) == sorted(mounts)
    command = ["/opt/my env/python", "-u", "-m", "submitit.core._submit", str(run.submitit_folder)]
    assert rest == [str(image), *command]
    assert (site.folder / "environment").read_text() == f"{run.attempts()[0].path} 1\n"
    check_outside(run)


def test_the_look_at_each_node_is_taken_in_the_container(site: Site) -> None:
    container = {"image": "registry#image:tag", "python": "/opt/my env/python"}
    put({"cluster": {"template": "pyxis_efa"}, "container": container, "slurm": {"preflight": True}})
    run = made()
    done = site.run(run)
    [attempt] = run.attempts()
    # Nobody has answered, which is no node's fault: the ranks are started, and fail.
    [looking] = [words for words in site.calls("srun") if "look" in words]
    assert len(site.calls("srun")) == 2
    assert "--ntasks-per-node=1" in looking
    assert "--container-image=registry#image:tag" in looking
    assert looking[-6:] == ["/opt/my env/python", "-m", "titan_slurm.run", "look", str(run.path), str(attempt.path)]
    assert "preflight: 0 nodes looked at" in done.stdout
    check_outside(run)
    # Where nobody wants it, there is nothing of it.
    put({"cluster": {"template": "pyxis_efa"}, "container": container})
    assert "preflight" not in made(name="other").script_file.read_text()


def test_a_mount_for_reading_is_not_enough_for_the_run(cli: CommandLine) -> None:
    here = Path().absolute()
    container = {"image": "x", "mounts": [f"{here}:{here}:ro", f"{here}:/elsewhere"]}
    put({"cluster": {"template": "pyxis_efa"}, "container": container})
    outcome = cli("render", "llama3_debug", "--cluster", "hpc", "--name", "mine")
    mounts = f"{here}:{here}:ro,{here}:/elsewhere,{here}/runs/mine:{here}/runs/mine"
    assert f" --container-mounts={mounts} " in outcome.out


def test_gpus_are_given_to_apptainer_where_there_are_any(cli: CommandLine) -> None:
    put({"cluster": {"template": "apptainer_modules"}, "container": {"image": "image.sif"}})
    launch = {}
    for gpus in (0, 2):
        settings = (f"slurm.gpus_per_node={gpus}", "slurm.tasks_per_node=2")
        given = [word for setting in settings for word in ("--set", setting)]
        launch[gpus] = cli("render", "llama3_debug", "--cluster", "hpc", *given).out
    assert "apptainer exec --bind=" in launch[0]
    assert "apptainer exec --nv --bind=" in launch[2]


def test_a_path_that_no_mount_can_name_is_refused(cli: CommandLine) -> None:
    put(CONTAINER | {"cluster": {"template": "pyxis_efa"}})
    outcome = cli("submit", "llama3_debug", "--cluster", "hpc", "--runs-dir", "a,b", "--name", "mine")
    assert outcome.code == 2
    path = Path("a,b/mine").absolute()
    assert outcome.errors == [f"{path}: a container cannot be given a path with ':' or ',' in it"]


def test_a_container_that_the_template_would_not_start(cli: CommandLine) -> None:
    put(CONTAINER | {"cluster": {"template": "plain"}})
    outcome = cli("render", "llama3_debug", "--cluster", "hpc")
    assert outcome.code == 2
    [error] = outcome.errors
    assert "clusters/hpc.toml:5: container.image is given, and the template plain starts no container" in error


def test_a_template_for_containers_where_there_is_none(cli: CommandLine) -> None:
    put({"cluster": {"template": "pyxis_efa"}})
    outcome = cli("render", "llama3_debug", "--cluster", "hpc")
    assert outcome.code == 2
    file = REPOSITORY / "templates" / "pyxis_efa.sbatch.j2"
    line = next(n for n, text in enumerate(file.read_text().splitlines(), start=1) if "set container_options" in text)
    assert outcome.errors == [
        f"{file}:{line}: 'container' is undefined (this template is for a cluster profile with a [container])"
    ]


def test_what_a_site_has_to_say_is_in_the_script(site: Site, tmp_path: Path) -> None:
    put(
        {
            "cluster": {"template": "plain"},
            "setup": {"modules": ["cuda/13.0", "nccl"], "conda": "my env"},
            "network": {"interface": "eth0,eth1", "infiniband": False, "infiniband_devices": "mlx5_0", "efa": True},
            "environment": {"NCCL_DEBUG": "WARN", "A": "$B"},
            "paths": {"scratch": str(tmp_path / "my scratch")},
        }
    )
    # The conda environment's Python, and what every rank finds in its environment.
    site.stand_in("python", f"echo {tmp_path}/attempt")
    site.stand_in("srun", f"export -p > {site.folder}/environment")
    run = made()
    done = site.run(run)
    assert done.returncode == 0, done.stderr
    assert site.calls("module") == [["load", "cuda/13.0"], ["load", "nccl"]]
    assert ["activate", "my env"] in site.calls("conda")
    environment = (site.folder / "environment").read_text().splitlines()
    for expected in (
        'A="\\$B"',
        'FI_PROVIDER="efa"',
        'GLOO_SOCKET_IFNAME="eth0,eth1"',
        'NCCL_DEBUG="WARN"',
        'NCCL_IB_DISABLE="1"',
        'NCCL_IB_HCA="mlx5_0"',
        'NCCL_SOCKET_IFNAME="=eth0,eth1"',
        f'TORCHINDUCTOR_CACHE_DIR="{tmp_path}/my scratch/torchinductor"',
        'SLURM_EXPORT_ENV="ALL"',
    ):
        assert f"declare -x {expected}" in environment
    assert site.calls("python")[0][:3] == ["-m", "titan_slurm.run", "begin"]
    [words] = site.calls("srun")
    assert words[2] == "python"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("module", "module load it's"),
        ("conda", "conda activate mine"),
        ("python", "beginning an attempt by python"),
    ],
)
def test_a_job_whose_environment_is_not_to_be_had_ends_before_it_begins(
    site: Site, monkeypatch: pytest.MonkeyPatch, broken: str, said: str
) -> None:
    put({"setup": {"modules": ["it's"], "conda": "mine"}})
    site.stand_in(broken, "exit 1")
    run = made()
    assert site.run(run).returncode == 1
    assert site.calls("srun") == []
    assert run.attempts() == []
    # Slurm knows no more than that the job failed.
    run.add_job({"job_id": "7", "cluster": "slurm", "time": time.time(), "user": "somebody"})
    site.stand_in("squeue", "echo '7|FAILED|NonZeroExitCode|n1'")
    monkeypatch.setenv("PATH", str(site.folder))
    seen = status(run)
    assert (seen.state, seen.reason) == (
        "failed",
        f"before the attempt began: {said} failed on {socket.gethostname()}; {run.path}/job.log says why",
    )


def test_the_environment_of_the_profile_trains(site: Site, tmp_path: Path) -> None:
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text("export ACTIVATED=yes\n")
    site.stand_in("python", f"echo {tmp_path}/attempt")
    (venv / "python").symlink_to(site.folder / "python")
    put({"setup": {"venv": str(venv.parent)}})
    run = made()
    assert site.run(run).returncode == 0
    assert f"{venv}/python -m titan_slurm.run begin" in run.script_file.read_text()
    [words] = site.calls("srun")
    assert words[2] == f"{venv}/python"


@pytest.mark.parametrize("name", ["base", "plain", "pyxis_efa", "apptainer_modules", "local"])
def test_each_template_makes_a_script_of_every_recipe(cli: CommandLine, name: str, tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    for command in ("bash", "cat"):
        (tmp_path / "commands" / command).symlink_to(shutil.which(command) or command)
    outcome = cli("templates", "check", name, env={"PATH": str(tmp_path / "commands")})
    assert outcome.code == 0, outcome.err
    count = len(list((REPOSITORY / "recipes").glob("*.toml")))
    path = REPOSITORY / "templates" / f"{name}.sbatch.j2"
    assert outcome.out == f"{path}: valid: {count} recipes make scripts that bash can read\n"


def test_templates_are_listed_and_shown(cli: CommandLine) -> None:
    mine = template(
        '{% extends "titan_slurm/base.sbatch.j2" %}\n{# For our own site. It is small. #}\n', "ours.sbatch.j2"
    )
    rows = cli("templates", "list").out.splitlines()
    assert rows[0].split() == ["NAME", "ORIGIN", "DESCRIPTION"]
    assert {row.split()[0] for row in rows[1:]} >= {"base", "plain", "pyxis_efa", "apptainer_modules", "ours"}
    [row] = [row for row in rows if row.startswith("ours")]
    assert row.rstrip().endswith("  user      For our own site")
    assert cli("templates", "show", "ours").out == mine.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/bash\n\n{{ partition }}\n", ":3: 'partition' is undefined"),
        ("#!/bin/bash\nif true\n", ": bash cannot read the script of recipe "),
    ],
)
def test_check_says_once_what_is_wrong_with_a_template(cli: CommandLine, text: str, said: str) -> None:
    path = template(text, "ours.sbatch.j2")
    outcome = cli("templates", "check", "ours")
    assert outcome.code == 2
    [error] = outcome.errors
    assert error.startswith(f"{path}{said}")


BUILT_IN = '(to extend the built-in one, write {% extends "titan_slurm/base.sbatch.j2" %})'


def test_check_says_of_each_template_what_is_wrong_and_goes_on(cli: CommandLine) -> None:
    said = {
        b"#!/bin/bash\n{% if plan %}\n": ":2: Unexpected end of template.",
        b"#!/bin/bash\n{{ name | shell }}\n": ":2: No filter named 'shell'.",
        b'{# ours #}\n{% extends "foo.j2" %}\n': ":2: there is no template 'foo.j2' to extend or include",
        b"#!/bin/bash\n# gr\xfc\xdfe\n": ":2: is not UTF-8 text",
        b"": f":1: the template makes an empty script {BUILT_IN}",
        b'\n{% extends "t5.sbatch.j2" %}\n': f":2: the template extends or includes itself {BUILT_IN}",
    }
    paths = [template("", f"t{number}.sbatch.j2") for number in range(len(said))]
    for path, text in zip(paths, said, strict=True):
        path.write_bytes(text)
    outcome = cli("templates", "check", *(path.name.partition(".")[0] for path in paths), "plain")
    assert outcome.code == 2
    for path, what, error in zip(paths, said.values(), outcome.errors, strict=True):
        assert error.startswith(f"{path}{what}")
    assert "plain.sbatch.j2: valid: " in outcome.out


def test_a_template_that_is_not_text_is_not_shown(cli: CommandLine) -> None:
    path = template("", "ours.sbatch.j2")
    path.write_bytes(b"#!/bin/bash\n\n# \xff\n")
    outcome = cli("templates", "show", "ours")
    assert (outcome.code, outcome.out, outcome.errors) == (2, "", [f"{path}:3: is not UTF-8 text"])


@pytest.mark.parametrize("other", ["", "other.sbatch.j2"])
def test_a_base_of_ones_own_that_extends_itself(cli: CommandLine, other: str) -> None:
    put({"cluster": {"template": "base"}, "container": {"image": "x"}})
    named = other or "base.sbatch.j2"
    path = template(f'{{% extends "{named}" %}}\n{{% set srun = [container.image] %}}\n')
    if other:
        template('{% extends "base.sbatch.j2" %}\n', other)
    outcome = cli("submit", "llama3_debug", "--cluster", "hpc", "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    [error] = outcome.errors
    assert error.startswith(str(path.parent))
    assert error.endswith(f".sbatch.j2:1: the template extends or includes itself {BUILT_IN}")


def test_check_asks_sbatch(cli: CommandLine, tmp_path: Path) -> None:
    commands = Site(tmp_path / "commands")
    commands.folder.mkdir()
    start = "sbatch: Job 7 to start at 2026-11-23T01:02:03 using 8 processors on nodes n1"
    refusal = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    # A site of one node.
    commands.stand_in(
        "sbatch", f"if grep -q -e '--nodes=1$'; then echo '{start}' >&2; else echo '{refusal}' >&2; exit 1; fi"
    )
    commands.stand_in("scontrol", "echo 'Slurmctld(primary) at head is UP'")
    path = {"PATH": f"{commands.folder}:{os.environ['PATH']}"}
    outcome = cli("templates", "check", "base", "--cluster", "slurm", env=path)
    assert outcome.code == 0, outcome.err
    assert "; sbatch would take " in outcome.out
    assert "Requested node configuration is not available" in outcome.err
    commands.stand_in("sbatch", "echo 'sbatch: error: invalid account' >&2; exit 1")
    outcome = cli("templates", "check", "base", "--cluster", "slurm", env=path)
    assert outcome.code == 2
    [error] = outcome.errors
    assert error.endswith("base.sbatch.j2: sbatch would take no recipe's script (the notes say why)")
