"""`titan-slurm recipes`: list, show, copy."""

from pathlib import Path
from typing import Annotated

import typer

from titan_slurm.cli import options

app = typer.Typer(
    help="The recipes that can be named: your own and the built-in ones.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_recipes(as_json: options.Json = False) -> None:
    """All recipes: name, version, model, ranks, whose."""
    import json

    from rich.table import Table

    from titan_slurm.cli import show
    from titan_slurm.errors import BadInputError
    from titan_slurm.recipe.find import recipes
    from titan_slurm.recipe.resolve import resolve

    rows = []
    for found in recipes():
        try:
            one = resolve(str(found.path), environment={})
        except BadInputError as error:
            show.note(f"{found.path} is not valid: {error.problems[0]}")
            continue
        model = one.recipe.model
        rows.append(
            {
                "name": found.name,
                "version": one.recipe.recipe.version,
                "model": f"{model.name} {model.flavor or 'custom'}",
                "nodes": one.layout.nodes,
                "ranks": one.layout.world_size,
                "origin": found.origin,
                "description": one.recipe.recipe.description,
                "path": str(found.path),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ("name", "version", "model", "nodes", "ranks", "origin", "description")
    for column in columns:
        table.add_column(column.upper(), no_wrap=column == "name")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    show.console().print(table)


@app.command("show")
def show_recipe(recipe: options.Recipe = None, settings: options.Set = None) -> None:
    """The resolved recipe as TOML, each value with where it came from."""
    from titan_slurm.cli import show
    from titan_slurm.launch.create import resolved_toml

    resolved = options.resolve(recipe, None, settings)
    show.note(f"recipe {resolved.name}: {resolved.found.path}")
    typer.echo(resolved_toml(resolved), nl=False)


@app.command("copy")
def copy_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe's file or name.", show_default=False)],
    to: Annotated[Path, typer.Argument(help="Folder or file.")] = Path("recipes"),
) -> None:
    """Copy a recipe, to change it: your own of the same name wins over the built-in one."""
    import shutil

    from titan_slurm.errors import bad_input
    from titan_slurm.recipe.find import recipe_file

    found = recipe_file(recipe)
    target = to if to.suffix == ".toml" else to / found.path.name
    if target.exists():
        raise bad_input(str(target), "exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found.path, target)
    typer.echo(target)
