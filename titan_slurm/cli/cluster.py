"""`titan-slurm cluster`: init, list, show, check."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.cluster.check import Finding
    from titan_slurm.cluster.profile import Profile

app = typer.Typer(
    help="Cluster profiles: what a site is like, for `submit --cluster NAME`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[
    str | None,
    typer.Argument(help="A profile's name or file; the one that submit would take if left out.", show_default=False),
]


@app.command("init")
def init(
    name: Annotated[
        str | None, typer.Argument(help="The profile's name; the cluster's if left out.", show_default=False)
    ] = None,
    to: Annotated[
        Path | None, typer.Argument(help="Folder or file; your own profiles' folder if left out.", show_default=False)
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option("--partition", help="For jobs in this partition; one with GPUs if left out.", show_default=False),
    ] = None,
) -> None:
    """Write a profile from what Slurm says of this site, to edit."""
    import re

    from titan_slurm.cluster import site as sites
    from titan_slurm.cluster.draft import draft
    from titan_slurm.errors import bad_input
    from titan_slurm.launch.place import CLUSTERS
    from titan_slurm.recipe.find import user_folder
    from titan_slurm.run.files import write_atomic

    site = sites.read()
    name = name or site.name
    if name in CLUSTERS or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        hint = "letters, digits, '.', '_', '-'; neither local nor slurm"
        raise bad_input("", f"{name!r} cannot be a profile's name", hint)
    folder = to or user_folder("clusters")
    target = folder if folder.suffix == ".toml" else folder / f"{name}.toml"
    if target.exists():
        raise bad_input(str(target), "exists already")
    text = draft(site, sites.choose_partition(site, partition))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text)
    except OSError as error:
        raise bad_input(str(target), f"cannot be written: {error.strerror}") from None
    typer.echo(target)


@app.command("list")
def list_profiles(as_json: options.Json = False) -> None:
    """All profiles that can be named."""
    import json

    from titan_slurm.cli import show
    from titan_slurm.cluster.profile import load
    from titan_slurm.errors import BadInputError
    from titan_slurm.recipe.find import clusters

    rows = []
    for found in clusters():
        try:
            settings = load(found.path, found.name).settings
        except BadInputError as error:
            show.note(f"{found.path} is not valid: {error.problems[0]}")
            continue
        rows.append(
            {
                "name": found.name,
                "origin": found.origin,
                "partition": settings.slurm.partition,
                "gpus": settings.nodes.gpus,
                "template": settings.cluster.template,
                "description": settings.cluster.description,
                "path": str(found.path),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        show.table(("name", "origin", "partition", "gpus", "template", "description"), rows)
    else:
        typer.echo("no cluster profiles; `titan-slurm cluster init` makes one")


@app.command("show")
def show_profile(name: Name = None) -> None:
    """A profile as TOML, with its defaults, and `~` and variables in its paths replaced."""
    import tomli_w

    from titan_slurm.cli import show

    profile = _profile(name)
    show.note(f"cluster {profile.name}: {profile.path}")
    typer.echo(tomli_w.dumps(profile.settings.model_dump(by_alias=True, exclude_none=True)), nl=False)


@app.command("check")
def check_profile(name: Name = None) -> None:
    """Hold a profile against the live site. Each line is right, or says what to do; then the exit code is 1."""
    from titan_slurm.cluster import site as sites
    from titan_slurm.cluster.check import check

    profile = _profile(name)
    findings = [*check(profile, sites.read()), _job_finding(profile)]
    for finding in findings:
        typer.echo(f"ok    {finding.what}" if finding.is_right else f"wrong {finding.what}: {finding.advice}")
    if not all(finding.is_right for finding in findings):
        raise typer.Exit(1)


def _profile(name: str | None) -> "Profile":
    from titan_slurm.errors import bad_input
    from titan_slurm.launch.place import choose

    profile = choose(name, without_slurm="slurm").profile
    if profile is None:
        raise bad_input("", "no cluster profile is named", "`titan-slurm cluster list` shows all, `init` makes one")
    return profile


def _job_finding(profile: "Profile") -> "Finding":
    """What sbatch says of a small job of one node."""
    from titan_slurm.cluster.check import Finding
    from titan_slurm.errors import BadInputError
    from titan_slurm.launch.submit import would_start

    gpus = [f"slurm.gpus_per_node={profile.settings.nodes.gpus}"] if profile.settings.nodes.gpus else []
    try:
        prepared = options.prepare("llama3_debug", 1, gpus, profile.path, "check", None, only_show=True)
    except BadInputError as error:
        return Finding("the batch script of a small job", str(error.problems[0]))
    answer = would_start(prepared)
    if answer is None or not answer.start:
        return Finding("sbatch, of a small job", answer.text if answer else "it does not answer")
    return Finding(f"sbatch would take a small job, and start it at {answer.start}")
