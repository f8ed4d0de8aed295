"""`titan-slurm recipes`: list, show, diff, copy, check."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.recipe.resolve import ResolvedRecipe

app = typer.Typer(
    help="The recipes that can be named: your own and the built-in ones.", no_args_is_help=True, rich_markup_mode=None
)
_Name = Annotated[str, typer.Argument(help="A recipe's file or name.", show_default=False)]


@app.command("list")
def list_recipes(as_json: options.Json = False) -> None:
    """All recipes: model, parameters, version, nodes, the memory that each GPU needs (an estimate), whose."""
    import json

    from titan_slurm.cli import show
    from titan_slurm.errors import BadInputError
    from titan_slurm.recipe.find import recipes

    rows = []
    for found in recipes():
        try:
            rows.append({"name": found.name, **_summary(_resolve(str(found.path))), "origin": found.origin})
        except BadInputError as error:
            show.note(f"{found.path} is not valid: {error.problems[0]}")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "name": lambda row: row["name"],
        "version": lambda row: row["version"],
        "model": lambda row: row["model"],
        "size": lambda row: _size(row["parameters"]),
        "nodes": lambda row: str(row["nodes"]),
        "ranks": lambda row: str(row["ranks"]),
        "memory/gpu": lambda row: f"{row['gpu_memory_bytes'] / 2**30:.0f} GiB" if row["gpu_memory_bytes"] else "-",
        "origin": lambda row: row["origin"],
        "description": lambda row: row["description"],
    }
    show.table(list(columns), [{column: text(row) for column, text in columns.items()} for row in rows])


@app.command("show")
def show_recipe(
    recipe: options.Recipe = None,
    settings: options.Set = None,
    everything: Annotated[bool, typer.Option("--all", help="Also what nobody set: the defaults.")] = False,
) -> None:
    """The resolved recipe as TOML, each value with where it came from."""
    from titan_slurm.cli import show
    from titan_slurm.launch.create import resolved_toml
    from titan_slurm.recipe.resolve import with_defaults

    resolved = options.resolve(recipe, None, settings)
    show.note(f"recipe {resolved.name}: {resolved.found.path}")
    typer.echo(resolved_toml(with_defaults(resolved) if everything else resolved), nl=False)


@app.command("diff")
def diff_recipes(a: _Name, b: _Name, as_json: options.Json = False) -> None:
    """The values, set or default, in which two recipes differ."""
    import json

    from titan_slurm.cli import show
    from titan_slurm.recipe.resolve import with_defaults

    one, other = (with_defaults(_resolve(name)) for name in (a, b))
    differing = {
        key: (one.values.get(key), other.values.get(key))
        for key in dict.fromkeys([*one.values, *other.values])
        if key[0] != "recipe" and _value(one, key) != _value(other, key)
    }
    if as_json:
        about = {which: {"name": each.name, "path": str(each.found.path)} for which, each in (("a", one), ("b", other))}
        values = {".".join(key): {"a": _value(one, key), "b": _value(other, key)} for key in differing}
        typer.echo(json.dumps({**about, "values": values}, indent=2, default=str))
    elif not differing:
        show.note(f"{one.name} and {other.name} do not differ")
    else:
        rows = [
            [".".join(key), *(_literal(each.value) if each else "-" for each in pair)]
            for key, pair in differing.items()
        ]
        headings = ["", *(f"{each.name} {each.recipe.recipe.version}" for each in (one, other))]
        show.console().print(show.make_table(headings, rows))


@app.command("copy")
def copy_recipe(
    recipe: _Name,
    to: Annotated[Path, typer.Argument(help="Folder or file.")] = Path("recipes"),
) -> None:
    """Copy a recipe, to change it: your own of the same name wins over the built-in one."""
    from titan_slurm.errors import bad_input
    from titan_slurm.recipe.find import recipe_file

    found = recipe_file(recipe)
    target = to if to.suffix == ".toml" else to / found.path.name
    if target.exists():
        raise bad_input(str(target), "exists already")
    text = _text_for(target, found.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text)
    typer.echo(target)


@app.command("check")
def check_recipes(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Recipes' files or names; all if left out.", show_default=False)
    ] = None,
) -> None:
    """Check recipes, all that can be named if none is, and report everything that is wrong with any of them."""
    from titan_slurm.errors import BadInputError, Problem
    from titan_slurm.recipe import find

    problems: list[Problem] = []
    for name in recipes or [str(found.path) for found in find.recipes()]:
        try:
            resolved = _resolve(name)
        except BadInputError as error:
            problems += error.problems
        else:
            typer.echo(f"{resolved.found.path}: valid: {resolved.name} {resolved.recipe.recipe.version}")
    if problems:
        # A mistake in a base is one mistake, however many recipes extend it.
        raise BadInputError(dict.fromkeys(problems))


def _resolve(name: str) -> "ResolvedRecipe":
    """A recipe as its files say, whatever the environment."""
    from titan_slurm.recipe.resolve import resolve

    return resolve(name, environment={})


def _summary(resolved: "ResolvedRecipe") -> dict[str, Any]:
    """What a list of recipes says of one."""
    from titan_slurm.recipe.estimate import estimate

    recipe, layout = resolved.recipe, resolved.layout
    cost = estimate(recipe, layout, torchtitan=resolved.torchtitan)
    config = recipe.model.config
    return {
        "version": recipe.recipe.version,
        "model": config["model_type"] if isinstance(config, dict) else recipe.model.name,
        "parameters": cost.parameters,
        "nodes": layout.nodes,
        "ranks": layout.world_size,
        "gpu_memory_bytes": cost.memory.total if cost.memory else None,
        "description": recipe.recipe.description,
        "path": str(resolved.found.path),
    }


def _size(parameters: int | None) -> str:
    """A number of parameters as people say it: 8.03B."""
    if parameters is None:
        return "-"
    # What rounds to a thousand millions is a billion.
    return f"{parameters / 1e9:.3g}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.3g}M"


def _value(resolved: "ResolvedRecipe", key: tuple[str, ...]) -> Any:
    value = resolved.values.get(key)
    return value.value if value else None


def _literal(value: Any) -> str:
    """A value as TOML writes it."""
    import tomli_w

    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _text_for(target: Path, source: Path) -> bytes:
    """The text of a recipe such that what it extends is the same file for a copy of it at `target`."""
    import os
    import re

    import tomli

    from titan_slurm import toml
    from titan_slurm.errors import BadInputError, bad_input
    from titan_slurm.recipe.find import recipe_file

    text = source.read_bytes()
    file = toml.read(source)
    about = file.tables.get("recipe")
    extends = about.get("extends") if isinstance(about, dict) else None
    if not isinstance(extends, str):
        return text
    base = recipe_file(extends, beside=source.parent).path
    try:
        if recipe_file(extends, beside=target.parent).path.samefile(base):
            return text
    except BadInputError:
        pass
    path = os.path.relpath(base, target.parent)
    where = file.where(("recipe", "extends"))
    lines = text.decode("utf-8-sig").split("\n")
    number = file.lines["recipe", "extends"] - 1
    lines[number] = re.sub(
        r"""(extends["']?\s*=\s*)("[^"]*"|'[^']*')""", lambda m: f"{m[1]}{_literal(path)}", lines[number]
    )
    new = "\n".join(lines)
    try:
        rewritten = tomli.loads(new)["recipe"]["extends"] == path
    except tomli.TOMLDecodeError:
        rewritten = False
    if not rewritten:
        raise bad_input(where, f"cannot be copied: what it extends would have to be {path!r} there", "copy it by hand")
    return new.encode()
