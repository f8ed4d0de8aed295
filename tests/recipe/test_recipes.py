"""The recipes that come with titan-slurm, and the register that holds each of them to its version."""

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w

from tests.conftest import REPOSITORY, CommandLine
from titan_slurm.launch.create import resolved_toml
from titan_slurm.recipe import versions
from titan_slurm.recipe.estimate import estimate
from titan_slurm.recipe.gpus import GPUS
from titan_slurm.recipe.resolve import ResolvedRecipe, Value, resolve
from titan_slurm.recipe.versions import content_hash

RECIPES = REPOSITORY / "recipes"
FILES = sorted(RECIPES.glob("*.toml"))
TOOL = REPOSITORY / "tools" / "recipe-versions"

every_recipe = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path) -> ResolvedRecipe:
    return resolve(str(file), environment={})


@every_recipe
def test_a_recipe_is_called_as_its_file_and_after_its_model(file: Path) -> None:
    recipe = read(file).recipe
    assert recipe.recipe.name == file.stem
    assert recipe.recipe.description
    assert recipe.recipe.version != "0.0.0"
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", file.stem)
    flavor = {"debugmodel": "debug"}.get(recipe.model.flavor or "", recipe.model.flavor)
    if flavor:
        assert file.stem.startswith(f"{recipe.model.name}_{re.sub('[.-]', '_', flavor.lower())}")


@every_recipe
def test_a_recipe_becomes_a_batch_script(cli: CommandLine, file: Path) -> None:
    outcome = cli("render", file.stem, "--cluster", "slurm")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("#!/bin/bash\n")
    # What is not on this machine is only a note where nothing is made.
    assert all(": data.tokenizer: there is no folder " in line for line in outcome.err.splitlines()[1:])


@every_recipe
def test_a_recipe_for_gpus_leaves_room_on_an_h100_and_time_for_its_last_checkpoint(file: Path) -> None:
    resolved = read(file)
    cost = estimate(resolved.recipe, resolved.layout, GPUS["H100"], torchtitan=resolved.torchtitan)
    if cost.memory is None:
        assert file.stem.endswith("_debug")
        return
    assert cost.memory.total < 0.8 * GPUS["H100"].memory
    assert cost.checkpoint_bytes is not None
    assert resolved.recipe.slurm.signal_lead >= 12 * cost.checkpoint_bytes / 1e9 / resolved.layout.nodes


def test_the_register_is_up_to_date() -> None:
    """What CI holds every change to: `tools/recipe-versions --check`."""
    assert run_tool("--check", RECIPES) == ""


def run_tool(*arguments: str | Path) -> str:
    """The errors that the tool reports."""
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    assert done.returncode == bool(done.stderr), done.stdout + done.stderr
    return done.stderr


def other(value: Any) -> Any:
    """A value of the same type that is not this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, "x"]
    raise AssertionError(f"no other value than {value!r} is known")


@every_recipe
def test_every_value_counts(file: Path) -> None:
    recipe = read(file)
    content = content_hash(recipe)
    for key, value in recipe.values.items():
        changed = recipe.values | {key: dataclasses.replace(value, value=other(value.value))}
        missing = {each: kept for each, kept in recipe.values.items() if each != key}
        for values in (changed, missing):
            assert (content_hash(dataclasses.replace(recipe, values=values)) == content) == (key[0] == "recipe"), key
    more = recipe.values | {("wandb", "group"): Value("x", "here")}
    assert content_hash(dataclasses.replace(recipe, values=more)) != content


def test_what_the_place_adds_is_not_of_the_recipe() -> None:
    recipe = read(RECIPES / "llama3_8b.toml")
    placed = recipe.values | {("slurm", "partition"): Value("gpu", "a profile", of_place=True)}
    assert content_hash(dataclasses.replace(recipe, values=placed)) == content_hash(recipe)


def test_no_two_recipes_are_the_same() -> None:
    assert len({content_hash(read(file)) for file in FILES}) == len(FILES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one registered recipe and its bases."""
    folder = tmp_path / "recipes"
    shutil.copytree(RECIPES / "base", folder / "base")
    shutil.copy(RECIPES / "llama3_8b.toml", folder)
    assert versions.add(folder) == [("llama3_8b", "1.0.0")]
    assert problems(folder) == []
    return folder


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in versions.check(folder, {})]


def set_value(file: Path, *path: str, value: Any) -> None:
    tables = tomli.loads(file.read_text())
    table = tables
    for name in path[:-1]:
        table = table.setdefault(name, {})
    table[path[-1]] = value
    file.write_text(tomli_w.dumps(tables))


def leaves(tables: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


@pytest.mark.parametrize("file", ["llama3_8b.toml", "base/llama3.toml", "base/pretraining.toml"])
def test_a_change_of_any_value_is_refused(folder: Path, file: str) -> None:
    text = (folder / file).read_text()
    values = [(path, value) for path, value in leaves(tomli.loads(text)) if path[0] != "recipe"]
    assert values
    for path, value in values:
        set_value(folder / file, *path, value=other(value))
        assert problems(folder), path
        (folder / file).write_text(text)
    assert problems(folder) == []


def test_a_refusal_says_what_to_do(folder: Path) -> None:
    set_value(folder / "base" / "llama3.toml", "optimizer", "beta2", value=0.99)
    [problem] = problems(folder)
    assert problem == (
        f"{folder}/llama3_8b.toml:7: llama3_8b is not what version 1.0.0 is registered as (raise its version and run "
        "tools/recipe-versions --add, or undo the change)"
    )


def test_order_comments_and_files_do_not_count(folder: Path) -> None:
    recipe = folder / "llama3_8b.toml"
    about, *sections = resolved_toml(read(recipe)).split("\n\n")
    backwards = [
        "\n".join([heading, *reversed(values)]) for heading, *values in map(str.splitlines, reversed(sections))
    ]
    recipe.write_text("# Another comment.\n" + "\n\n".join([*backwards, about]))
    assert "extends" not in recipe.read_text()
    assert problems(folder) == []


def test_a_new_version_of_a_changed_recipe_is_registered_beside_the_old(folder: Path) -> None:
    recipe = folder / "llama3_8b.toml"
    set_value(recipe, "optimizer", "lr", value=1e-4)
    before = (folder / versions.REGISTER).read_text()
    assert "undo the change" in run_tool("--add", folder)
    assert (folder / versions.REGISTER).read_text() == before

    set_value(recipe, "recipe", "version", value="1.10.0")
    [problem] = problems(folder)
    assert "llama3_8b 1.10.0 is not registered (run tools/recipe-versions --add)" in problem
    assert run_tool("--add", folder) == ""
    assert problems(folder) == []
    after = (folder / versions.REGISTER).read_text().splitlines()
    assert after[:-1] == before.splitlines()
    assert after[-1].startswith("llama3_8b 1.10.0 ")

    # Nobody gets an older recipe under a newer name's neighbour: 1.9.0 is less than 1.10.0.
    set_value(recipe, "recipe", "version", value="1.9.0")
    assert any("llama3_8b 1.9.0 is older than 1.10.0, which is registered" in problem for problem in problems(folder))


def test_a_recipe_without_a_version_in_the_register_is_refused(folder: Path) -> None:
    shutil.copy(RECIPES / "llama3_70b.toml", folder)
    [problem] = problems(folder)
    assert problem.startswith(f"{folder}/llama3_70b.toml:")
    assert "llama3_70b 1.0.0 is not registered" in problem


def test_a_recipe_that_goes_away_is_refused(folder: Path) -> None:
    (folder / "llama3_8b.toml").unlink()
    [problem] = problems(folder)
    assert "llama3_8b is registered, and there is no such recipe" in problem


def test_a_recipe_that_is_not_valid_is_refused(folder: Path) -> None:
    set_value(folder / "llama3_8b.toml", "training", "max_step", value=3)
    [problem] = problems(folder)
    assert "did you mean 'max_steps'?" in problem


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "llama3_8b 1.0.0", "llama3_8b one " + "0" * 64])
def test_a_line_that_is_none_is_refused(folder: Path, line: str) -> None:
    with (folder / versions.REGISTER).open("a") as file:
        file.write(line + "\n")
    [problem] = problems(folder)
    assert problem.startswith(f"{folder}/versions.txt:4: is no line of the register")


def test_a_version_stands_once(folder: Path) -> None:
    register = folder / versions.REGISTER
    register.write_text(register.read_text() + register.read_text().splitlines()[-1] + "\n")
    [problem] = problems(folder)
    assert "versions.txt:4: llama3_8b 1.0.0 is registered twice" in problem


@pytest.fixture
def committed(folder: Path) -> Callable[[], None]:
    """A function that commits the folder, which it makes a git repository first."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    def commit() -> None:
        git("add", "--all")
        git("commit", "--message", "Change recipes")

    git("init")
    return commit


def test_a_version_that_was_registered_stays(folder: Path, committed: Callable[[], None]) -> None:
    recipe, register = folder / "llama3_8b.toml", folder / versions.REGISTER
    assert run_tool("--check", folder) == ""  # A repository without a commit.
    committed()
    set_value(recipe, "optimizer", "lr", value=1e-4)
    set_value(recipe, "recipe", "version", value="1.1.0")
    run_tool("--add", folder)
    committed()
    assert run_tool("--check", folder) == ""

    *heading, first, second = register.read_text().splitlines()
    register.write_text("\n".join([*heading, second]) + "\n")
    assert "llama3_8b 1.0.0 was registered and is gone (restore its line: " in run_tool("--check", folder)
    committed()  # Not only what is about to be committed is looked at.
    assert "llama3_8b 1.0.0 was registered and is gone" in run_tool("--check", folder)

    flipped = first[:-1] + ("1" if first.endswith("0") else "0")
    register.write_text("\n".join([*heading, flipped, second]) + "\n")
    assert "versions.txt:3: llama3_8b 1.0.0 was registered with another content" in run_tool("--check", folder)

    register.write_text("\n".join([*heading, first, second]) + "\n")
    assert run_tool("--check", folder) == ""


def test_a_changed_recipe_cannot_take_its_version_along(folder: Path, committed: Callable[[], None]) -> None:
    committed()
    set_value(folder / "llama3_8b.toml", "optimizer", "lr", value=1e-4)
    (folder / versions.REGISTER).unlink()
    assert "llama3_8b 1.0.0 was registered with another content" in run_tool("--add", folder)
