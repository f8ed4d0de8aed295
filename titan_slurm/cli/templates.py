"""`titan-slurm templates`: list, show, check."""

from typing import Annotated

import typer

from titan_slurm.cli import options

app = typer.Typer(
    help="The templates of batch scripts: your own, the site's and the built-in ones.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_templates(as_json: options.Json = False) -> None:
    """All templates that a cluster profile can name."""
    import json

    from titan_slurm.cli import show
    from titan_slurm.launch.templates import about
    from titan_slurm.recipe.find import templates

    rows = [
        {"name": found.name, "origin": found.origin, "description": about(found), "path": str(found.path)}
        for found in templates()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        show.table(("name", "origin", "description"), rows)


@app.command("show")
def show_template(template: Annotated[str, typer.Argument(help="A template's name or file.")] = "base") -> None:
    """A template's text."""
    from titan_slurm.cli import show
    from titan_slurm.launch.rendering import source
    from titan_slurm.recipe.find import template_file

    found = template_file(template)
    show.note(f"template {found.name}: {found.path}")
    typer.echo(source(found), nl=False)


@app.command("check")
def check_templates(
    templates: Annotated[
        list[str] | None, typer.Argument(help="Templates' names or files; all if left out.", show_default=False)
    ] = None,
    cluster: options.Cluster = None,
) -> None:
    """Render templates with every recipe, have bash read the scripts, and ask sbatch, where there is one, whether it
    would take them."""
    from titan_slurm.cli import show
    from titan_slurm.errors import BadInputError, Problem
    from titan_slurm.launch.place import choose
    from titan_slurm.launch.templates import try_out
    from titan_slurm.recipe import find

    place = choose(cluster, without_slurm="slurm")
    problems: list[Problem] = []
    for found in [find.template_file(name) for name in templates] if templates else find.templates():
        trial = try_out(found, place)
        problems += trial.problems
        if trial.problems:
            continue
        asked = len(trial.accepted) + sum(map(len, trial.refused.values()))
        sbatch = f"; sbatch would take {len(trial.accepted)} of {asked}" if asked else ""
        typer.echo(f"{found.path}: valid: {len(trial.rendered)} recipes make scripts that bash can read{sbatch}")
        for text, recipes in trial.refused.items():
            show.note(f"sbatch, of {found.name} with {', '.join(recipes)}: {text}")
        if asked and not trial.accepted:
            problems.append(Problem(str(found.path), "sbatch would take no recipe's script", "the notes say why"))
    if problems:
        raise BadInputError(problems)
