"""A live Slurm site as its own commands show it."""

import os
import pwd
import re
from dataclasses import dataclass, field

from titan_slurm.cluster import slurm
from titan_slurm.errors import bad_input, did_you_mean


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike: CPUs and memory (MB) of each, GPUs by type ("" for GPUs without one)."""

    count: int
    cpus: int
    memory: int
    gpus: dict[str, int]
    features: frozenset[str] = frozenset()
    is_up: bool = True

    def gpus_of(self, kind: str | None) -> int:
        """GPUs of that type in each node; of the most frequent type where none is named."""
        return self.gpus.get(kind, 0) if kind else max(self.gpus.values(), default=0)


@dataclass(frozen=True)
class Partition:
    """A partition: `facts` as `scontrol show partition` names them."""

    name: str
    facts: dict[str, str]
    nodes: list[NodeKind] = field(default_factory=list)

    @property
    def is_default(self) -> bool:
        """Whether jobs that name no partition come here."""
        return self.facts.get("Default") == "YES"

    @property
    def gpus(self) -> int:
        """GPUs of all its nodes."""
        return sum(kind.count * sum(kind.gpus.values()) for kind in self.nodes)

    def allows(self, what: str, name: str) -> bool:
        """Whether an account or a QOS may be used here; `what`: Accounts or Qos."""
        allowed, denied = self.facts.get(f"Allow{what}", "ALL"), self.facts.get(f"Deny{what}", "")
        return name not in denied.split(",") and (allowed == "ALL" or name in allowed.split(","))


@dataclass(frozen=True)
class Site:
    """What Slurm says of itself. `accounts`, of the user, and `qos` are None where accounting does not answer."""

    config: dict[str, str]
    partitions: dict[str, Partition]
    accounts: list[str] | None
    qos: list[str] | None
    reservations: list[str]

    @property
    def name(self) -> str:
        """The cluster's name in Slurm."""
        return self.config.get("ClusterName", "cluster")

    @property
    def default_partition(self) -> Partition | None:
        """Where jobs go that name no partition."""
        return next((partition for partition in self.partitions.values() if partition.is_default), None)

    @property
    def has_gpus(self) -> bool:
        """Whether GPUs are something that Slurm hands out."""
        return "gpu" in self.config.get("GresTypes", "").split(",")

    @property
    def has_gpu_options(self) -> bool:
        """Whether sbatch's options --gpus… work: they belong to one plugin alone."""
        return self.config.get("SelectType") == "select/cons_tres"

    def enforces(self, what: str) -> bool:
        """Whether jobs with an unknown account (`associations`) or QOS (`qos`) are refused."""
        return what in self.config.get("AccountingStorageEnforce", "none").lower().split(",")


def read() -> Site:
    """Ask Slurm. Raises BadInputError where it does not answer."""
    config = slurm.ask("scontrol", "show", "config")
    partitions = slurm.ask("scontrol", "show", "partition", "--oneliner")
    nodes = slurm.ask("sinfo", "--noheader", "--exact", "--all", "--format=%R|%D|%c|%m|%G|%f|%T")
    if config is None or partitions is None or nodes is None:
        raise bad_input(
            "", "Slurm does not answer here", "`sinfo` shows what is wrong; a profile is made where it works"
        )
    user = pwd.getpwuid(os.getuid()).pw_name
    accounts = slurm.ask(
        "sacctmgr", "--noheader", "--parsable2", "show", "assoc", "where", f"user={user}", "format=Account"
    )
    qos = slurm.ask("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name")
    reservations = slurm.ask("scontrol", "show", "reservation", "--oneliner") or ""
    return Site(
        config=parse_config(config),
        partitions=parse_partitions(partitions, nodes),
        accounts=None if accounts is None else sorted({line for line in accounts.splitlines() if line}),
        qos=None if qos is None else qos.split(),
        reservations=re.findall(r"ReservationName=(\S+)", reservations),
    )


def parse_config(text: str) -> dict[str, str]:
    """The lines `Name = value` of `scontrol show config`."""
    return {name: value.strip() for name, value in re.findall(r"^(\S+)\s+= (.*)$", text, re.MULTILINE)}


def parse_partitions(partitions: str, nodes: str) -> dict[str, Partition]:
    """Partitions by name, from `scontrol show partition --oneliner` and from sinfo's lines
    partition|count|CPUs|memory|gres|features|state."""
    found: dict[str, Partition] = {}
    for line in partitions.splitlines():
        facts = dict(re.findall(r"(?:^| )(\w+)=(\S*)", line))
        if "PartitionName" in facts:
            found[facts["PartitionName"]] = Partition(facts["PartitionName"], facts)
    for line in nodes.splitlines():
        name, count, cpus, memory, gres, features, state = line.split("|")
        if name in found:
            known = frozenset() if features == "(null)" else frozenset(features.split(","))
            found[name].nodes.append(
                NodeKind(int(count), _number(cpus), _number(memory), parse_gpus(gres), known, is_up(state))
            )
    return found


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs by type from a node's gres, such as gpu:h100:8(S:0-1),nvme:1."""
    gpus: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+?))?:(\d+)", gres):
        gpus[kind] = gpus.get(kind, 0) + int(count)
    return gpus


# Sinfo's long states; a star after one marks nodes that do not answer.
_DOWN = re.compile(r"(down|drain|drained|draining|fail|failing|unknown|maint)|.*\*$")


def is_up(state: str) -> bool:
    """Whether a node in that state, as sinfo's %T has it, takes jobs now or later."""
    return not _DOWN.match(state)


def _number(text: str) -> int:
    # Where sinfo puts nodes together that differ it shows the least, and a plus sign.
    return int(text.rstrip("+"))


def choose_partition(site: Site, name: str | None) -> Partition:
    """The partition of that name, or the default one if it has GPUs or none has, or the one with most GPUs. Raises
    BadInputError if there is none."""
    if name is not None:
        if name not in site.partitions:
            raise bad_input("--partition", f"there is no partition {name!r}", did_you_mean(name, site.partitions))
        return site.partitions[name]
    default = site.default_partition
    most = max(site.partitions.values(), key=lambda partition: partition.gpus, default=None)
    if most is None:
        raise bad_input("", "Slurm shows no partition here")
    return default if default is not None and (default.gpus or not most.gpus) else most


def about(partition: Partition, site: Site) -> str:
    """A partition in a line: its nodes, its time limit, and who may take them away."""
    nodes = ", ".join(about_kind(kind) for kind in kinds(partition)) or "no nodes"
    down = [] if partition.facts.get("State", "UP") == "UP" else ["down"]
    return "; ".join([*down, nodes, time_limit(partition), about_preemption(partition, site)])


def kinds(partition: Partition) -> list[NodeKind]:
    """The kinds of nodes, whatever their states."""
    found: dict[tuple[int, int, str], NodeKind] = {}
    for kind in partition.nodes:
        key = (kind.cpus, kind.memory, str(kind.gpus))
        count = kind.count + (found[key].count if key in found else 0)
        found[key] = NodeKind(count, kind.cpus, kind.memory, kind.gpus)
    return list(found.values())


def about_kind(kind: NodeKind) -> str:
    """Nodes that are alike, in some words."""
    gpus = " + ".join(f"{count} {f'{name} ' if name else ''}GPUs" for name, count in kind.gpus.items()) or "no GPUs"
    return f"{kind.count} {'node' if kind.count == 1 else 'nodes'} with {gpus}"


def time_limit(partition: Partition) -> str:
    """The longest that a job may run, in some words."""
    limit = partition.facts.get("MaxTime", "UNLIMITED")
    return "no time limit" if limit == "UNLIMITED" else f"at most {limit}"


def about_preemption(partition: Partition, site: Site) -> str:
    """Whether jobs are preempted, and how much time they then have, in some words."""
    mode = partition.facts.get("PreemptMode") or site.config.get("PreemptMode", "OFF")
    if site.config.get("PreemptType", "preempt/none") == "preempt/none" or mode in ("OFF", "GANG"):
        return "not preempted"
    grace = partition.facts.get("GraceTime", "0")
    kill_wait = re.sub(r"\D", "", site.config.get("KillWait", "30"))
    if grace == "0":
        return f"preempted by {mode} without grace: SIGKILL comes {kill_wait} s after SIGTERM"
    return f"preempted by {mode}, with {grace} s of grace"


def seconds(time: str) -> float:
    """A time limit as Slurm writes it: minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, rest_s = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, rest_s = parts
    else:
        hours, (minutes, rest_s) = 0, [*parts, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest_s
