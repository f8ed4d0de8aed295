"""Where recipes, templates and cluster profiles stand: the user's own first, then the site's, then those that come with
titan-slurm."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan_slurm.errors import bad_input, did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent
# What an administrator puts there is everybody's.
_SITE = Path("/etc/titan-slurm")


@dataclass(frozen=True)
class Found:
    """A file and whose it is: `path` (named by the user), `user`, `site` or `built-in`."""

    path: Path
    origin: str

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.name.removesuffix(".toml").removesuffix(".sbatch.j2")


def recipe_file(name: str, beside: Path | None = None) -> Found:
    """The recipe called `name`: a path, or the name of one of the user's or the built-in recipes.

    `beside` is the folder in which relative paths are looked for first. Raises BadInputError if there is none.
    """
    return _find("recipes", name, ".toml", "recipe", beside)


def template_file(name: str) -> Found:
    """The sbatch template called `name`, found like a recipe."""
    return _find("templates", name, ".sbatch.j2", "template", None)


def cluster_file(name: str) -> Found:
    """The cluster profile called `name`, found like a recipe. None comes with titan-slurm."""
    return _find("clusters", name, ".toml", "cluster profile", None)


def recipes() -> list[Found]:
    """All recipes that can be named, the user's own before the site's and built-in ones of the same name."""
    return _all("recipes", ".toml")


def templates() -> list[Found]:
    """All templates that can be named."""
    return _all("templates", ".sbatch.j2")


def clusters() -> list[Found]:
    """All cluster profiles that can be named."""
    return _all("clusters", ".toml")


def folders(kind: str) -> list[tuple[Path, str]]:
    """Where `recipes`, `templates` or `clusters` are looked for, in this order, and whose they are."""
    return [
        (Path.cwd() / kind, "user"),
        (user_folder(kind), "user"),
        (_SITE / kind, "site"),
        (built_in(kind), "built-in"),
    ]


def user_folder(kind: str) -> Path:
    """The folder of a user's own recipes, templates or cluster profiles, wherever the user works."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "titan-slurm" / kind


def built_in(kind: str) -> Path:
    """The folder of the recipes or templates that come with titan-slurm."""
    installed = _PACKAGE / "share" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def _all(kind: str, ending: str) -> list[Found]:
    found: dict[str, Found] = {}
    for folder, origin in _distinct_folders(kind):
        for path in sorted(folder.glob(f"*{ending}")):
            found.setdefault(path.name, Found(path, origin))
    return sorted(found.values(), key=lambda file: file.name)


def _distinct_folders(kind: str) -> Iterator[tuple[Path, str]]:
    """`folders` without the user's where it is the built-in one: the working directory may be the repository itself."""
    shipped = built_in(kind)
    for folder, origin in folders(kind):
        if origin == "built-in" or not (folder.is_dir() and shipped.is_dir() and folder.samefile(shipped)):
            yield folder, origin


def _find(kind: str, name: str, ending: str, what: str, beside: Path | None) -> Found:
    is_path = "/" in name or name.endswith(ending)
    for path in (beside / name, Path(name)) if beside else (Path(name),):
        if is_path and path.is_file():
            is_built_in = built_in(kind).is_dir() and path.resolve().parent == built_in(kind).resolve()
            return Found(path, "built-in" if is_built_in else "path")
    # `recipes/llama3_8b.toml` names the built-in recipe from any folder, also where there is no such file; and a copy
    # of it, wherever that is, still finds its `base/llama3.toml`.
    path = Path(name)
    inside = path.relative_to(kind) if Path(kind) in path.parents else path
    if not path.is_absolute() and ".." not in path.parts:
        for folder, origin in _distinct_folders(kind):
            file = folder / inside.parent / (inside.name.removesuffix(ending) + ending)
            if file.is_file():
                return Found(file, origin)
    known = [file.name for file in _all(kind, ending)]
    hint = did_you_mean(Path(name).name.removesuffix(ending), known)
    raise bad_input(name, f"there is no such {what}, neither a file nor the name of one", hint)
