"""What each version of a recipe stands for: a hash of its content, and the register that holds them all. Git, and what
the register once held, do not live here."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.recipe.find import Found
from titan_slurm.recipe.resolve import ResolvedRecipe, resolve

REGISTER = "versions.txt"
"""The register's name beside the recipes. One line for each version, and nothing that holds lines together, such as
brackets and commas: two branches that register something merge, and a line that goes missing is seen."""

_HEADING = """\
# Every version of every recipe, with the SHA-256 of its content. Lines are added by `tools/recipe-versions --add`, and
# none is ever changed or taken away.
"""

_LINE = re.compile(r"(\S+) (\d+\.\d+\.\d+) ([0-9a-f]{64})")

Key = tuple[str, str]
"""A recipe's name and version."""


@dataclass(frozen=True)
class Registered:
    """A version's content hash and the line (from 1) that it stands on."""

    content: str
    line: int


def content_hash(resolved: ResolvedRecipe) -> str:
    """SHA-256, as 64 hexadecimal digits, of every value that is set after `extends`, environment and command line.

    What a recipe says of itself (its name, version and description) does not count, nor does what only the place adds,
    nor do order, comments, and which file a value stands in.
    """
    content = sorted(
        (list(key), value.value) for key, value in resolved.values.items() if key[0] != "recipe" and not value.of_place
    )
    # A date, which only a model's own table may hold, is what TOML prints of it.
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_register(text: str, name: str) -> dict[Key, Registered]:
    """The register's lines; `name` is what errors call it. Raises BadInputError with every line that is none."""
    registered: dict[Key, Registered] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if not parts:
            problems.append(Problem(f"{name}:{number}", "is no line of the register", "a name, a version and a hash"))
        elif (parts[1], parts[2]) in registered:
            problems.append(Problem(f"{name}:{number}", f"{parts[1]} {parts[2]} is registered twice", "keep one"))
        else:
            registered[parts[1], parts[2]] = Registered(parts[3], number)
    if problems:
        raise BadInputError(problems)
    return registered


def write_register(contents: Mapping[Key, str]) -> str:
    """The register's text."""
    ordered = sorted(contents, key=lambda key: (key[0], _order(key[1])))
    return _HEADING + "".join(f"{name} {version} {contents[name, version]}\n" for name, version in ordered)


def check(folder: Path, earlier: Mapping[Key, str]) -> list[Problem]:
    """What is wrong with the versions of a folder's recipes; `earlier` is what its register held at any time before."""
    file = folder / REGISTER
    try:
        registered = read_register(_text(file), str(file))
    except BadInputError as error:
        return error.problems
    problems = [*_kept(registered, earlier, file)]
    for name, recipe in _recipes(folder, problems).items():
        problems += _recipe_problems(name, recipe, registered)
    for name in dict.fromkeys(name for name, _ in registered):
        if not (folder / f"{name}.toml").is_file():
            problems.append(Problem(str(file), f"{name} is registered, and there is no such recipe", "restore it"))
    return problems


def add(folder: Path) -> list[Key]:
    """Register every version of a folder's recipes that is not yet registered; returns these.

    Raises BadInputError, and writes nothing, where a version that is registered would get another content.
    """
    file = folder / REGISTER
    registered = read_register(_text(file), str(file))
    problems: list[Problem] = []
    new: dict[Key, str] = {}
    for name, recipe in _recipes(folder, problems).items():
        version = recipe.recipe.recipe.version
        if (name, version) in registered:
            problems += _recipe_problems(name, recipe, registered)
        else:
            new[name, version] = content_hash(recipe)
    if problems:
        raise BadInputError(problems)
    if new:
        file.write_text(write_register({key: each.content for key, each in registered.items()} | new))
    return list(new)


def _recipes(folder: Path, problems: list[Problem]) -> dict[str, ResolvedRecipe]:
    """The folder's recipes by file name, without those that are not valid, whose problems are added."""
    recipes: dict[str, ResolvedRecipe] = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            recipes[Found(path, "path").name] = resolve(str(path), environment={})
        except BadInputError as error:
            problems += error.problems
    return recipes


def _recipe_problems(name: str, recipe: ResolvedRecipe, registered: Mapping[Key, Registered]) -> Iterable[Problem]:
    version = recipe.recipe.recipe.version
    given = recipe.values.get(("recipe", "version"))
    where = given.origin if given else str(recipe.found.path)
    entry = registered.get((name, version))
    newest = max((other for known, other in registered if known == name), key=_order, default=version)
    if entry is None:
        yield Problem(where, f"{name} {version} is not registered", "run tools/recipe-versions --add")
    elif entry.content != content_hash(recipe):
        what = f"{name} is not what version {version} is registered as"
        yield Problem(where, what, "raise its version and run tools/recipe-versions --add, or undo the change")
    if _order(version) < _order(newest):
        yield Problem(where, f"{name} {version} is older than {newest}, which is registered", "raise its version")


def _kept(registered: Mapping[Key, Registered], earlier: Mapping[Key, str], file: Path) -> Iterable[Problem]:
    for (name, version), content in earlier.items():
        entry = registered.get((name, version))
        if entry is None:
            yield Problem(str(file), f"{name} {version} was registered and is gone", f"restore its line: {content}")
        elif entry.content != content:
            what = f"{name} {version} was registered with another content"
            yield Problem(f"{file}:{entry.line}", what, f"restore {content}")


def _order(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise bad_input(str(file), f"cannot be read: {error}") from None
