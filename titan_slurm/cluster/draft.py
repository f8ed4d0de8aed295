"""A first cluster profile, made from what a live site says of itself, for its user to edit."""

import json
from pathlib import Path

from titan_slurm.cluster.site import NodeKind, Partition, Site, about, about_kind, kinds, time_limit

_NETWORK_FILE_SYSTEMS = {"beegfs", "ceph", "gpfs", "lustre", "nfs", "nfs4", "panfs", "wekafs"}

_DRAFT = """\
# A cluster profile of titan-slurm, made from what Slurm {version} says of cluster {site}.
# `titan-slurm cluster check` holds it against the site; a line that begins with # says nothing yet.

[cluster]
schema = 1
description = {description}
# template = "plain"       # or a template of your own: `titan-slurm templates list`

[slurm]                    # for recipes that do not say
partition = {partition}
{partitions}
{account}
{time}
gpu_request = {gpu_request}
# refused = ["mem"]        # options of sbatch that this site refuses: never sent
# srun = ["--mpi=none"]    # more options of srun
# preflight = true         # look at every node for some seconds before each attempt

# [slurm.sbatch]           # more options of sbatch
# wckey = "project"

[nodes]                    # what a node has; a recipe that asks for more is refused
{nodes}

# [setup]
# modules = ["cuda/13.0"]
# venv = "/shared/venv"    # with titan-slurm; or conda. Left out: the Python that submits

# [network]
# interface = "eth0"       # for the ranks to find each other

# [environment]
# NCCL_DEBUG = "WARN"

# [paths]
# shared = ["/home"]       # what all nodes see at the same place. Network file systems here: {shared}
# scratch = "/tmp/$USER"   # a fast folder on each node, for what torch.compile makes
"""


def draft(site: Site, partition: Partition) -> str:
    """The text of a profile for jobs in that partition, and what else the site has as comments."""
    return _DRAFT.format(
        version=site.config.get("SLURM_VERSION", ""),
        site=site.name,
        description=_toml(f"{site.name}, partition {partition.name}"),
        partition=_toml(partition.name),
        partitions="\n".join(f"#   {each.name}: {about(each, site)}" for each in site.partitions.values()),
        account="\n".join(_account_lines(site)),
        time=_time_line(partition),
        gpu_request=_gpu_request(site),
        nodes="\n".join(_node_lines(partition)),
        shared=", ".join(_network_file_systems()) or "none",
    )


def _toml(text: str) -> str:
    # A string of JSON is one of TOML.
    return json.dumps(text, ensure_ascii=False)


def _account_lines(site: Site) -> list[str]:
    if site.accounts is None:
        return ["# Accounting does not answer here; titan-slurm does without it."]
    enforced = "jobs need one" if site.enforces("associations") else "jobs need none"
    lines = [f'# account = "…"            # {enforced}; yours: {", ".join(site.accounts) or "none"}']
    return lines + ([f'# qos = "…"                # there are: {", ".join(site.qos)}'] if site.qos else [])


def _time_line(partition: Partition) -> str:
    default = partition.facts.get("DefaultTime", "NONE")
    without = f"jobs without it get {default}" if default != "NONE" else "jobs without it get all of that"
    return f'# time = "1-00:00:00"      # of one attempt; {time_limit(partition)}, {without}'


def _gpu_request(site: Site) -> str:
    if not site.has_gpus:
        return '"none"       # Slurm hands out no GPUs here'
    return '"gpus-per-node"' if site.has_gpu_options else '"gres"       # this Slurm has no --gpus-per-node'


def _node_lines(partition: Partition) -> list[str]:
    alike = kinds(partition)
    if not alike:
        return [f"# Partition {partition.name} has no nodes now."]
    kind = max(alike, key=_weight)
    lines = [f"gpus = {max(kind.gpus.values(), default=0)}"]
    gpu_type = max(kind.gpus, key=lambda name: kind.gpus[name], default="")
    lines += [f"gpu_type = {_toml(gpu_type)}"] if gpu_type else []
    lines += [f"cpus = {kind.cpus}", f'memory = "{kind.memory}M"']
    if len(alike) > 1:
        lines.append(f"# Not all nodes are like this: {', '.join(map(about_kind, alike))}.")
    return lines


def _weight(kind: NodeKind) -> tuple[int, int]:
    """Most GPUs first, then most nodes."""
    return kind.count * sum(kind.gpus.values()), kind.count


def _network_file_systems() -> list[str]:
    mounts = Path("/proc/mounts")
    fields = [line.split() for line in mounts.read_text(errors="replace").splitlines()] if mounts.exists() else []
    return [folder for _, folder, kind, *_ in fields if kind in _NETWORK_FILE_SYSTEMS]
