"""Cluster profiles, schema 1: what a site is like, from a TOML file, and what recipes that do not say get there. How a
profile meets a recipe does not live here."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, RootModel

from titan_slurm import toml
from titan_slurm.errors import BadInputError
from titan_slurm.fields import (
    Count,
    Flag,
    Kind,
    Line,
    Memory,
    Placement,
    Positive,
    Section,
    Text,
    check_sections,
    matching,
)
from titan_slurm.run.redact import is_secret_name
from titan_slurm.toml import Key


def _expand(text: str) -> str:
    """`~` and `$NAME` by the environment of whoever submits: on the nodes nothing of a profile is expanded."""
    expanded = os.path.expandvars(Path(text).expanduser()) if text.startswith("~") else os.path.expandvars(text)
    if "$" in expanded:
        raise ValueError("names a variable that is not set here")
    return expanded


def _absolute(text: str) -> str:
    expanded = _expand(text)
    if not expanded.startswith("/"):
        raise ValueError("must be an absolute path")
    # These separate one path from the next in a list of mounts.
    if any(character in expanded for character in ":,"):
        raise ValueError("must not have ':' or ',' in it")
    return expanded.rstrip("/") or "/"


def _mount(text: str) -> str:
    parts = text.split(":")
    if len(parts) > 3 or parts[2:] not in ([], ["ro"], ["rw"]):
        raise ValueError("must be SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro")
    source, target = _absolute(parts[0]), _absolute(parts[1] if parts[1:] else parts[0])
    return f"{source}:{target}" + (":ro" if parts[2:] == ["ro"] else "")


def _image(text: str) -> str:
    return _absolute(text) if text.startswith(("/", "~", "$")) else text


def _variable(name: str) -> str:
    if name.startswith(("TITAN_SLURM_", "SUBMITIT_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        raise ValueError("is set by titan-slurm itself")
    if is_secret_name(name):
        raise ValueError("looks like a secret, which the batch script would show; export it where you submit")
    return name


AbsolutePath = Annotated[Line, AfterValidator(_absolute)]
Mount = Annotated[Line, AfterValidator(_mount)]
# Where it stands by itself in a command, a dash would make it an option.
_Argument = matching(r"[^\s-].*", "a name, with neither a space nor a dash before it")
Word = Annotated[Line, matching(r"[^\s-]\S*", "one word, without a dash before it")]
Variable = Annotated[str, matching(r"[A-Za-z_][A-Za-z0-9_]*", "a variable's name"), AfterValidator(_variable)]
VariableValue = Annotated[str, Field(coerce_numbers_to_str=True), matching(r"[^\x00-\x1f\x7f]*", "one line of text")]
Interfaces = Annotated[Line, matching(r"[\w.@-]+(,[\w.@-]+)*", "names of network interfaces, e.g. eth0")]
# Without these a run can do; what it cannot do without is no field of a profile.
Refusable = Literal[
    "account",
    "comment",
    "constraint",
    "cpus-per-task",
    "exclude",
    "exclusive",
    "mem",
    "partition",
    "qos",
    "reservation",
    "time",
]


class ClusterSection(Section):
    """`[cluster]`: what this file is."""

    schema_: Literal[1] = Field(1, alias="schema", description="the profile format; this is 1")
    description: str = Field("", description="one line for people")
    template: Text = Field("base", description="the template of the batch script: a name, or a path")


class SlurmSection(Placement):
    """`[slurm]`: what recipes that do not say ask of Slurm here, and how it is asked."""

    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node",
        description='how GPUs are asked for: "gres" is --gres=gpu:8, "none" is for sites without gres',
    )
    refused: list[Refusable] = Field(
        default_factory=list, description="options of sbatch that this site refuses: never sent, whoever asks for them"
    )


class NodesSection(Section):
    """`[nodes]`: what each node has. A recipe that asks for more is refused."""

    gpus: Count | None = Field(None, description="also the gpus_per_node of recipes that do not say")
    gpu_type: Line | None = Field(None, description="as Slurm calls it; asked for by name")
    cpus: Positive | None = None
    memory: Memory | None = None


class SetupSection(Section):
    """`[setup]`: what the batch script does first, on the first node of the job."""

    modules: list[Word] = Field(default_factory=list, description="for `module load`, in this order")
    venv: AbsolutePath | None = Field(None, description="a virtual environment with titan-slurm")
    conda: Annotated[Line, _Argument] | None = Field(None, description="a conda environment with titan-slurm")


class Environment(RootModel[dict[Variable, VariableValue]]):
    """`[environment]`: variables for every rank, as they stand: nothing in them is expanded."""


class ContainerSection(Section):
    """`[container]`: for templates that start the ranks in one."""

    image: Annotated[Line, _Argument, AfterValidator(_image)] = Field(
        description="a file that all nodes see, or whatever the container runtime takes for one"
    )
    mounts: list[Mount] = Field(
        default_factory=list,
        description="SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro; what the run itself needs is mounted in any case",
    )
    python: Annotated[Line, _Argument] = Field(
        "python3", description="in the container, where titan-slurm and what it needs are installed: a command or path"
    )


class NetworkSection(Section):
    """`[network]`: for NCCL and gloo."""

    interface: Interfaces | None = Field(None, description="for the ranks to find each other, e.g. eth0")
    infiniband: Flag | None = Field(None, description="false keeps NCCL from it")
    infiniband_devices: Line | None = Field(None, description="as NCCL_IB_HCA takes them, e.g. mlx5_0,mlx5_1")
    efa: Flag = Field(False, description="AWS's Elastic Fabric Adapter")


class PathsSection(Section):
    """`[paths]`"""

    shared: list[AbsolutePath] = Field(
        default_factory=list,
        description="file systems that all nodes see at the same place: a run elsewhere is refused, and a container "
        "sees all of them",
    )
    scratch: AbsolutePath | None = Field(None, description="a fast folder on each node, for what torch.compile makes")


class WandbSection(Section):
    """`[wandb]`"""

    mode: Literal["auto", "online", "offline", "disabled"] = Field("auto", description="for recipes that do not say")


class NotifySection(Section):
    """`[notify]`: who hears that a run has ended, unless its user has cancelled it."""

    mail: Annotated[Line, _Argument] | None = Field(
        None, description="an address to which Slurm writes; each job of a run that ends is a mail"
    )
    webhook_file: AbsolutePath | None = Field(
        None,
        description="a file of mode 600 with the URL of a webhook in Slack's form; TITAN_SLURM_WEBHOOK, where you "
        "submit, comes before it",
    )
    command: list[Line] = Field(
        default_factory=list, description="a program and its arguments, which gets a line of text on standard input"
    )


class Settings(Section):
    """A whole profile. A missing section is its defaults."""

    cluster: ClusterSection = ClusterSection()
    slurm: SlurmSection = SlurmSection()
    nodes: NodesSection = NodesSection()
    setup: SetupSection = SetupSection()
    environment: Environment = Environment({})
    container: ContainerSection | None = None
    network: NetworkSection = NetworkSection()
    paths: PathsSection = PathsSection()
    wandb: WandbSection = WandbSection()
    notify: NotifySection = NotifySection()


SECTIONS: dict[str, Kind] = {
    "cluster": ClusterSection,
    "slurm": SlurmSection,
    "nodes": NodesSection,
    "setup": SetupSection,
    "environment": Environment,
    "container": ContainerSection,
    "network": NetworkSection,
    "paths": PathsSection,
    "wandb": WandbSection,
    "notify": NotifySection,
}


@dataclass(frozen=True)
class Profile:
    """A checked profile, and where each value in it stands."""

    name: str
    path: str
    settings: Settings
    origins: dict[Key, str]

    def given(self) -> dict[str, Any]:
        """What the file says, and nothing else, as plain values; `restore` is the inverse."""
        return self.settings.model_dump(exclude_unset=True, by_alias=True)

    def where(self, *key: str) -> str:
        """`file:line` of a value, or the file."""
        return self.origins.get(key, self.path)


def load(path: Path, name: str) -> Profile:
    """Read and check a profile. Raises BadInputError with everything that is wrong in it."""
    file = toml.read(path)
    values: dict[Key, tuple[Any, str]] = {}
    for key, value in toml.flatten(file.tables).items():
        # A table without keys says nothing.
        if not (value == {} and len(key) == 1 and key[0] in SECTIONS):
            values[key] = (value, file.where(key))
    parts, problems = check_sections(SECTIONS, values)
    if problems:
        raise BadInputError(problems)
    origins = {key: where for key, (_, where) in values.items()}
    return Profile(name, str(path.absolute()), Settings.model_validate(parts), origins)


def restore(name: str, path: str, given: Mapping[str, Any], origins: Mapping[Key, str]) -> Profile:
    """A profile as a run has it in its plan. Raises ValueError if it is none of this schema."""
    return Profile(name, path, Settings.model_validate(given), dict(origins))
