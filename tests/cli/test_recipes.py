"""`titan-slurm recipes`: what a user sees of the recipes, and gets of them."""

import json
import re
from pathlib import Path

import pytest
import tomli

from tests.conftest import REPOSITORY, CommandLine
from titan_slurm.recipe.resolve import resolve
from titan_slurm.recipe.schema import Recipe, sections

RECIPES = REPOSITORY / "recipes"


def write(name: str, text: str) -> Path:
    """A file in the working directory."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return Path(name)


def values(recipe: str | Path) -> dict[str, object]:
    """What a recipe sets."""
    return {".".join(key): each.value for key, each in resolve(str(recipe), environment={}).values.items()}


def test_list_has_every_recipe_and_no_base(cli: CommandLine) -> None:
    outcome = cli("recipes", "list", "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    rows = {row["name"]: row for row in json.loads(outcome.out)}
    assert list(rows) == sorted(path.stem for path in RECIPES.glob("*.toml"))
    memory = rows["llama3_70b"].pop("gpu_memory_bytes")
    assert 10 * 2**30 < memory < 80 * 2**30
    assert rows["llama3_70b"] == {
        "name": "llama3_70b",
        "version": "1.0.0",
        "model": "llama3",
        "parameters": 70_553_706_496,
        "nodes": 16,
        "ranks": 128,
        "origin": "built-in",
        "description": "Llama 3.1 70B pre-training, FSDP 16 × TP 8, 8 M tokens a step",
        "path": f"{RECIPES}/llama3_70b.toml",
    }
    assert rows["llama3_debug"]["gpu_memory_bytes"] is None
    assert rows["gemma3_4b"]["model"] == "gemma3_text"


def test_list_for_people(cli: CommandLine) -> None:
    heading, *rows = cli("recipes", "list").out.splitlines()
    assert " ".join(heading.split()) == "NAME VERSION MODEL SIZE NODES RANKS MEMORY/GPU ORIGIN DESCRIPTION"
    cells = {row.split()[0]: re.split("  +", row.strip()) for row in rows}
    assert cells["llama3_70b"][:6] == ["llama3_70b", "1.0.0", "llama3", "70.6B", "16", "128"]
    assert re.fullmatch(r"\d+ GiB", cells["llama3_70b"][6])
    assert cells["llama3_debug"][3:7] == ["6.16M", "1", "2", "-"]


def test_list_does_not_look_at_the_environment(cli: CommandLine) -> None:
    assert cli("recipes", "list", env={"TORCHTITAN_TP_SIZE": "3"}).out == cli("recipes", "list").out


def test_show_all_has_every_value_with_a_default(cli: CommandLine) -> None:
    outcome = cli("recipes", "show", "llama3_8b", "--all", "--set", "training.seed=7")
    tables = tomli.loads(outcome.out)
    for name, section in sections().items():
        for field, info in section.model_fields.items() if section and name != "recipe" else ():
            default = info.get_default(call_default_factory=True)
            if default not in (None, {}):
                assert field in tables[name], f"{name}.{field}"
    lines = outcome.out.splitlines()
    assert f"lr = 0.0003  # {RECIPES}/llama3_8b.toml:23" in lines
    assert f"beta2 = 0.95  # {RECIPES}/base/pretraining.toml:14" in lines
    assert 'implementation = "fused"  # default' in lines
    assert "seed = 7  # --set training.seed=7" in lines


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_what_show_prints_is_the_recipe(cli: CommandLine, recipe: str) -> None:
    def content(name: str) -> Recipe:
        return resolve(name, environment={}).recipe

    for option in ((), ("--all",)):
        write("shown.toml", cli("recipes", "show", recipe, *option).out)
        assert content("shown.toml").model_dump(exclude={"recipe"}) == content(recipe).model_dump(exclude={"recipe"})


def test_diff_shows_what_differs_side_by_side(cli: CommandLine) -> None:
    outcome = cli("recipes", "diff", "llama3_8b", "llama3_70b")
    assert outcome.code == 0
    heading, *rows = outcome.out.splitlines()
    assert heading.split() == ["llama3_8b", "1.0.0", "llama3_70b", "1.0.0"]
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells["model.flavor"] == ['"8B"', '"70B"']
    assert cells["optimizer.lr"] == ["0.0003", "0.00015"]
    # One of them leaves it at its default.
    assert cells["parallelism.tensor_parallel"] == ["1", "8"]
    assert "optimizer.beta2" not in cells
    assert not any(key.startswith("recipe.") for key in cells)


def test_diff_for_a_program(cli: CommandLine) -> None:
    write("mine.toml", '[recipe]\nextends = "llama3_8b"\n[optimizer]\nlr = 1e-4\n[wandb]\ntags = ["[a]", "b"]\n')
    found = json.loads(cli("recipes", "diff", "llama3_8b", "mine.toml", "--json").out)
    assert found["a"] == {"name": "llama3_8b", "path": f"{RECIPES}/llama3_8b.toml"}
    assert found["b"] == {"name": "mine", "path": "mine.toml"}
    assert found["values"] == {"optimizer.lr": {"a": 3e-4, "b": 1e-4}, "wandb.tags": {"a": [], "b": ["[a]", "b"]}}


def test_diff_of_a_value_that_only_one_has(cli: CommandLine) -> None:
    write(
        "mine.toml",
        '[recipe]\nextends = "llama3_8b"\n[slurm]\npartition = "gpu"\n[torchtitan]\ndebug.print_config = true\n',
    )
    assert json.loads(cli("recipes", "diff", "mine.toml", "llama3_8b", "--json").out)["values"] == {
        "slurm.partition": {"a": "gpu", "b": None},
        "torchtitan.debug.print_config": {"a": True, "b": None},
    }
    rows = [row.split() for row in cli("recipes", "diff", "mine.toml", "llama3_8b").out.splitlines()]
    assert ["slurm.partition", '"gpu"', "-"] in rows


def test_diff_of_what_says_the_same(cli: CommandLine) -> None:
    # To say what is the default anyway is no difference.
    write("mine.toml", '[recipe]\nextends = "llama3_8b"\nversion = "3.0.0"\n[training]\nseed = 0\n')
    outcome = cli("recipes", "diff", "llama3_8b", "mine.toml")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "note: llama3_8b and mine do not differ\n"


def test_diff_of_a_recipe_that_is_not_there(cli: CommandLine) -> None:
    outcome = cli("recipes", "diff", "llama3_8b", "llama3_80b")
    assert outcome.code == 2
    assert "did you mean" in outcome.err


@pytest.mark.parametrize("to", ["recipes", "elsewhere/mine.toml"])
def test_a_copy_still_extends_the_built_in_base(cli: CommandLine, to: str) -> None:
    outcome = cli("recipes", "copy", "llama3_8b", to)
    assert outcome.code == 0
    copy = Path(outcome.out.strip())
    assert copy.read_bytes() == (RECIPES / "llama3_8b.toml").read_bytes()
    assert values(copy) == values(RECIPES / "llama3_8b.toml")
    assert cli("recipes", "check", copy).code == 0


def test_a_copy_extends_the_same_file_from_another_place(cli: CommandLine) -> None:
    write("project/shared/base.toml", '[recipe]\nextends = "llama3_8b"\n[training]\nseed = 3\n')
    # The old path leads to another file there.
    write("copies/shared/base.toml", '[recipe]\nextends = "llama3_8b"\n[training]\nseed = 4\n')
    text = '# Mine.\n[recipe]\n  "extends" = \'{}\' # the base\n[wandb]\ngroup = "extends = 1"\n'
    source = write("project/mine.toml", text.format("shared/base.toml"))
    assert cli("recipes", "copy", source, "copies").code == 0
    assert Path("copies/mine.toml").read_text() == text.replace("'{}'", '"../project/shared/base.toml"')
    assert values("copies/mine.toml") == values(source) | {"recipe.extends": "../project/shared/base.toml"}


def test_a_copy_of_a_built_in_recipe_does_not_fall_for_a_base_of_ones_own(cli: CommandLine) -> None:
    write("recipes/base/llama3.toml", '[recipe]\nextends = "base/pretraining.toml"\n[model]\nname = "qwen3"\n')
    assert cli("recipes", "copy", "llama3_8b").code == 0
    copied = values("recipes/llama3_8b.toml")
    assert {**copied, "recipe.extends": "base/llama3.toml"} == values(RECIPES / "llama3_8b.toml")


def test_a_base_that_a_copy_cannot_name_is_said(cli: CommandLine) -> None:
    write("project/base.toml", '[recipe]\nextends = "llama3_8b"\n')
    source = write("project/mine.toml", '[recipe]\nextends = """base.toml"""\n')
    outcome = cli("recipes", "copy", source, "copies")
    assert outcome.code == 2
    [error] = outcome.errors
    assert error.startswith("project/mine.toml:2: cannot be copied")
    assert "'../project/base.toml'" in error
    assert not Path("copies").exists()


def test_check_looks_at_every_recipe(cli: CommandLine) -> None:
    write("recipes/mine.toml", '[recipe]\nextends = "llama3_8b"\nversion = "0.1.0"\n')
    outcome = cli("recipes", "check")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert len(lines) == 1 + len(list(RECIPES.glob("*.toml")))
    assert any(line.endswith("recipes/mine.toml: valid: mine 0.1.0") for line in lines)


def test_check_reports_everything_that_is_wrong(cli: CommandLine) -> None:
    write("recipes/one.toml", '[recipe]\nextends = "llama3_8b"\n[training]\nmax_step = 3\nseq_len = "long"\n')
    write("recipes/shared.toml", '[recipe]\nextends = "llama3_8b"\n[optimizer]\nlr = -1\n')
    write("recipes/two.toml", '[recipe]\nextends = "shared.toml"\n')
    outcome = cli("recipes", "check")
    assert outcome.code == 2
    here = Path.cwd()
    assert sorted(error.split(": ")[0] for error in outcome.errors) == [
        f"{here}/recipes/one.toml:4",
        f"{here}/recipes/one.toml:5",
        # Once, though two recipes have it.
        f"{here}/recipes/shared.toml:4",
    ]
    # The others are still looked at.
    assert f"{RECIPES}/qwen3_8b.toml: valid: qwen3_8b 1.0.0" in outcome.out


def test_check_of_the_recipes_that_are_named(cli: CommandLine) -> None:
    write("bad.toml", "[training]\nmax_step = 3\n")
    outcome = cli("recipes", "check", "llama3_8b", "bad.toml", "llama3_9b")
    assert outcome.code == 2
    assert outcome.out == f"{RECIPES}/llama3_8b.toml: valid: llama3_8b 1.0.0\n"
    assert len([error for error in outcome.errors if error.startswith("bad.toml")]) == 1
    assert "did you mean" in outcome.errors[-1]
