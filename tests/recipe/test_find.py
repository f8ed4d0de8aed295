"""Which recipe a name means, and what `titan-slurm recipes` does with it."""

import json
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, CommandLine

BUILT_IN = REPOSITORY / "recipes" / "llama3_debug.toml"
CHANGED = BUILT_IN.read_text().replace('version = "1.0.0"', 'version = "9.9.9"')


def put(path: Path) -> Path:
    """A changed recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CHANGED)
    return path


@pytest.mark.parametrize("name", ["llama3_debug", "llama3_debug.toml", "recipes/llama3_debug.toml"])
def test_a_built_in_recipe_is_found_from_any_folder(cli: CommandLine, name: str) -> None:
    outcome = cli("validate", name)
    assert outcome.code == 0
    assert f"note: recipe llama3_debug 1.0.0: built-in, {BUILT_IN}\n" in outcome.err


@pytest.mark.parametrize("folder", ["here/recipes", "home/.config/titan-slurm/recipes"])
def test_the_users_own_recipe_wins_and_it_is_said(cli: CommandLine, tmp_path: Path, folder: str) -> None:
    mine = put(tmp_path / folder / "llama3_debug.toml")
    assert f"note: recipe llama3_debug 9.9.9: your own, {mine}\n" in cli("validate", "llama3_debug").err


def test_the_users_folder_is_the_one_of_the_environment(cli: CommandLine, tmp_path: Path) -> None:
    put(tmp_path / "settings" / "titan-slurm" / "recipes" / "llama3_debug.toml")
    put(tmp_path / "home" / ".config" / "titan-slurm" / "recipes" / "llama3_debug.toml")
    at_home = cli("validate", "llama3_debug", env={"XDG_CONFIG_HOME": ""}).err
    assert f"your own, {tmp_path}/home/.config/titan-slurm/recipes/llama3_debug.toml" in at_home
    elsewhere = cli("validate", "llama3_debug", env={"XDG_CONFIG_HOME": str(tmp_path / "settings")}).err
    assert f"your own, {tmp_path}/settings/titan-slurm/recipes/llama3_debug.toml" in elsewhere


def test_a_recipe_here_wins_over_one_in_the_users_folder(cli: CommandLine, tmp_path: Path) -> None:
    put(tmp_path / "home" / ".config" / "titan-slurm" / "recipes" / "llama3_debug.toml")
    here = put(Path("recipes/llama3_debug.toml").absolute())
    assert f"your own, {here}" in cli("validate", "llama3_debug").err


def test_a_path_is_that_file(cli: CommandLine) -> None:
    put(Path("recipes/llama3_debug.toml"))
    mine = put(Path("elsewhere/llama3_debug.toml"))
    assert f"note: recipe llama3_debug 9.9.9: {mine}\n" in cli("validate", mine).err


def test_in_the_repository_the_recipes_are_the_built_in_ones(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in ("llama3_debug", "recipes/llama3_debug.toml"):
        assert "llama3_debug 1.0.0: built-in, " in cli("validate", name).err


def test_a_recipe_that_extends_a_name_takes_the_users_own_too(cli: CommandLine) -> None:
    put(Path("recipes/llama3_debug.toml"))
    Path("mine.toml").write_text('[recipe]\nextends = "llama3_debug"\n')
    assert cli("recipes", "show", "mine.toml").out.count("llama3_debug.toml:") > 5
    assert str(BUILT_IN) not in cli("recipes", "show", "mine.toml").out


def test_list_shows_every_recipe_once_and_whose_it_is(cli: CommandLine) -> None:
    put(Path("recipes/llama3_debug.toml"))
    put(Path("recipes/llama3.1_mine.toml"))
    outcome = cli("recipes", "list")
    assert outcome.code == 0
    heading, *rows = outcome.out.splitlines()
    assert heading.split()[0] == "NAME"
    by_name = {row.split()[0]: row for row in rows}
    assert len(by_name) == len(rows)
    assert set(by_name) >= {"llama3.1_mine", "llama3_8b", "llama3_debug"}
    assert "9.9.9" in by_name["llama3_debug"]
    assert " user " in by_name["llama3_debug"]
    assert " built-in " in by_name["llama3_8b"]


def test_list_for_a_program(cli: CommandLine) -> None:
    rows = {row["name"]: row for row in json.loads(cli("recipes", "list", "--json").out)}
    assert set(rows) >= {"llama3_8b", "llama3_debug"}
    assert rows["llama3_debug"]["ranks"] == 2
    assert rows["llama3_debug"]["origin"] == "built-in"
    assert rows["llama3_debug"]["path"] == str(BUILT_IN)
    assert rows["llama3_8b"]["parameters"] == 8_030_261_248


def test_list_goes_on_after_a_recipe_that_is_not_valid(cli: CommandLine) -> None:
    Path("recipes").mkdir()
    Path("recipes/broken.toml").write_text("[training\n")
    outcome = cli("recipes", "list", "--json")
    assert outcome.code == 0
    assert {row["name"] for row in json.loads(outcome.out)} >= {"llama3_8b", "llama3_debug"}
    assert "broken.toml is not valid" in outcome.err


def test_copy_makes_a_recipe_of_ones_own(cli: CommandLine) -> None:
    outcome = cli("recipes", "copy", "llama3_debug")
    assert outcome.code == 0
    assert outcome.out == "recipes/llama3_debug.toml\n"
    assert Path("recipes/llama3_debug.toml").read_text() == BUILT_IN.read_text()
    assert "your own, " in cli("validate", "llama3_debug").err


def test_copy_to_a_file(cli: CommandLine) -> None:
    assert cli("recipes", "copy", "llama3_debug", "deep/down/mine.toml").code == 0
    assert Path("deep/down/mine.toml").read_text() == BUILT_IN.read_text()


def test_copy_overwrites_nothing(cli: CommandLine) -> None:
    mine = put(Path("recipes/llama3_debug.toml"))
    outcome = cli("recipes", "copy", str(BUILT_IN))
    assert outcome.code == 2
    assert outcome.errors == ["recipes/llama3_debug.toml: exists already"]
    assert mine.read_text() == CHANGED
