"""`titan-slurm convert`: what it says, what it writes, and what it refuses."""

from pathlib import Path

import pytest
import tomli

from tests.conftest import REPOSITORY, CommandLine
from tests.test_no_heavy_imports import HEAVY, imported

DATA = REPOSITORY / "tests" / "data" / "convert"
ZERO3 = DATA / "deepspeed" / "own_pretraining.json"


def test_a_config_becomes_a_recipe_that_validate_takes(cli: CommandLine) -> None:
    outcome = cli("convert", ZERO3, "--to", "recipes/mine.toml", "--extends", "llama3_debug")
    assert (outcome.code, outcome.out) == (0, "recipes/mine.toml\n")
    assert f"note: {ZERO3} is a DeepSpeed config (it has zero_optimization); " in outcome.err
    assert "note: titan-slurm validate recipes/mine.toml" in outcome.err
    recipe = tomli.loads(Path("recipes/mine.toml").read_text())
    assert recipe["recipe"] == {"schema": 1, "name": "mine", "version": "1.0.0", "extends": "llama3_debug"}
    assert recipe["optimizer"]["lr"] == 3e-5
    # Everything is there, and offloading from a GPU is what a recipe for CPUs cannot have.
    [error] = cli("validate", "recipes/mine.toml").errors
    assert error.startswith("recipes/mine.toml:")
    assert "memory.cpu_offload" in error


def test_without_a_base_validate_says_what_is_missing(cli: CommandLine) -> None:
    assert cli("convert", DATA / "deepspeed" / "swift_zero2.json", "--to", "mine.toml").code == 0
    outcome = cli("validate", "mine.toml")
    assert outcome.code == 2
    assert any("model.flavor: no flavor is given" in error for error in outcome.errors)
    assert any("neither it nor gradient_accumulation_steps is given" in error for error in outcome.errors)


def test_what_has_no_counterpart_is_said_and_stands_in_the_recipe(cli: CommandLine) -> None:
    outcome = cli("convert", ZERO3)
    for line in ("To look at: the recipe does not do this:", "    fp16.enabled = true", "    fp16.loss_scale = 0"):
        assert line in outcome.err.splitlines()
        assert f"# {line}" in outcome.out.splitlines()


def test_without_a_target_the_recipe_is_printed(cli: CommandLine) -> None:
    outcome = cli("convert", ZERO3)
    assert outcome.code == 0
    assert tomli.loads(outcome.out)["parallelism"] == {"reshard_after_forward": "always"}
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(("folder", "name", "said"), [
    ("accelerate", "own_context_parallel.yaml", "an Accelerate config (it has distributed_type)"),
    ("torchtitan", "own_llama3_8b.toml", "a job config of torchtitan 0.2 or older (it has training)"),
    ("deepspeed", "own_experts.json", "a DeepSpeed config (it has zero_optimization)"),
])  # fmt: skip
def test_the_kind_is_said(cli: CommandLine, folder: str, name: str, said: str) -> None:
    assert f"is {said}; " in cli("convert", DATA / folder / name).err


def test_the_kind_can_be_forced(cli: CommandLine) -> None:
    Path("fragment.json").write_text('{"wall_clock_breakdown": true, "comms_logger": {"enabled": true}}')
    [error] = cli("convert", "fragment.json").errors
    assert error == (
        "fragment.json: is not recognised as a config of DeepSpeed, Accelerate or torchtitan "
        "(say which by --from deepspeed|accelerate|torchtitan)"
    )
    outcome = cli("convert", "fragment.json", "--from", "deepspeed")
    assert outcome.code == 0
    assert "is a DeepSpeed config (--from deepspeed); 0 values" in outcome.err
    assert "    comms_logger.enabled = true" in outcome.err.splitlines()


def test_a_file_without_a_telling_name_is_read_all_the_same(cli: CommandLine) -> None:
    for folder, name in (
        ("deepspeed", ZERO3.name),
        ("accelerate", "trl_fsdp2.yaml"),
        ("torchtitan", "own_llama3_8b.toml"),
    ):
        Path("config").write_text((DATA / folder / name).read_text())
        outcome, named = cli("convert", "config"), cli("convert", DATA / folder / name)
        assert {**tomli.loads(outcome.out), "recipe": {}} == {**tomli.loads(named.out), "recipe": {}}


BAD = {
    "not JSON": ("a.json", '{\n  "zero_optimization": {\n}', "a.json:3: not JSON: "),
    "JSON with a comment": ("a.json", '{\n"fp16": {} // off\n}', "DeepSpeed allows, are to be taken out"),
    "a JSON field twice": ("a.json", '{"fp16": {"enabled": true, "enabled": false}}', "'enabled' is given twice"),
    "not YAML": ("a.yaml", "distributed_type: FSDP\nfsdp_config: [1\n", "a.yaml:3: not YAML that can be used: "),
    "a YAML field twice": ("a.yaml", "distributed_type: FSDP\ndebug: false\ndebug: true\n", "a.yaml:3: "),
    "a YAML field twice, as text": ("a.yaml", "distributed_type: FSDP\n1: 2\n'1': 3\n", "the field 1 is given twice"),
    "a YAML object": ("a.yaml", "distributed_type: !!python/name:os.system\n", "a.yaml:1: not YAML that can be used"),
    "a YAML table in itself": ("a.yaml", "distributed_type: FSDP\nx: &x\n  y: *x\n", "x.y contains itself"),
    "a character that is none in YAML": ("a.yaml", "distributed_type: \x01\n", "a.yaml: not YAML: "),
    "not TOML": ("a.toml", "[training]\nsteps = = 3\n", "a.toml:2: not TOML: "),
    "none of the three": ("config", "a: [1", "config: is neither JSON nor TOML nor YAML"),
    "a list": ("a.json", "[1, 2]", "a.json: is no config: at its top there are no named fields"),
    "another program's": ("a.json", '{"fsdp": "full_shard", "fsdp_config": {}}', "a.json: is not recognised as"),
    "a recipe": ("a.toml", "[recipe]\nschema = 1\n[training]\nmax_steps = 3\n", "it looks like a recipe"),
    "nested without end": ("a.json", '{"fp16": ' + "[" * 5000 + "]" * 5000 + "}", "a.json: is nested too deeply"),
    "half a character": ("a.toml.json", '{"job": {"description": "\\ud800"}}', "a.toml.json: has half a character"),
    "not text": ("a.json", b"\xff\xfe{", "a.json: is not UTF-8 text"),
    "a DeepSpeed config that is not there": (
        "a.yaml",
        "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n",
        "a.yaml: deepspeed_config.deepspeed_config_file names ds.json, which is not there",
    ),
}


@pytest.mark.parametrize(("name", "text", "says"), BAD.values(), ids=[what.replace(" ", "_") for what in BAD])
def test_a_bad_file_is_one_error(cli: CommandLine, name: str, text: str | bytes, says: str) -> None:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = cli("convert", name, "--to", "out.toml")
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    [error] = outcome.errors
    assert error.startswith(name)
    assert says in error
    assert [path.name for path in Path().iterdir()] == [name]


def test_a_bad_deepspeed_config_is_named_with_its_line(cli: CommandLine) -> None:
    Path("folder").mkdir()
    Path("folder/ds.json").write_text('{\n"fp16": }')
    Path("a.yaml").write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: folder/ds.json}\nnum_processes: 8\n"
    )
    [error] = cli("convert", "a.yaml").errors
    assert error.startswith("folder/ds.json:2: not JSON")


@pytest.mark.parametrize(("arguments", "error"), [
    (("nowhere.json",), "nowhere.json: cannot be read: No such file or directory"),
    ((".",), ".: cannot be read: Is a directory"),
    ((ZERO3, "--from", "deepsped"), "--from deepsped: there is no such kind of config (did you mean 'deepspeed'?)"),
    ((ZERO3, "--extends", "lama3_8b"), "lama3_8b: there is no such recipe, neither a file nor the name of one"),
    ((ZERO3, "--to", "mine"), "--to mine: is not the name of a recipe's file (which ends in .toml)"),
    ((ZERO3, "--to", "/dev/null/deep/mine.toml"), "/dev/null/deep/mine.toml: cannot be written: Not a directory"),
])  # fmt: skip
def test_a_bad_argument_is_one_error(cli: CommandLine, arguments: tuple[str | Path, ...], error: str) -> None:
    outcome = cli("convert", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    [said] = outcome.errors
    assert said.startswith(error)
    assert list(Path().iterdir()) == []


def test_what_is_there_is_not_overwritten(cli: CommandLine) -> None:
    Path("mine.toml").write_text("mine")
    outcome = cli("convert", ZERO3, "--to", "mine.toml")
    assert (outcome.code, outcome.errors) == (2, ["mine.toml: exists already"])
    assert Path("mine.toml").read_text() == "mine"


def test_a_base_that_is_a_file_is_named_from_where_the_recipe_stands(cli: CommandLine) -> None:
    Path("mine").mkdir()
    Path("mine/base.toml").write_text('[recipe]\nextends = "llama3_debug"\n')
    config = DATA / "deepspeed" / "autotuning_zero3.json"
    assert cli("convert", config, "--to", "mine/new.toml", "--extends", "mine/base.toml").code == 0
    assert tomli.loads(Path("mine/new.toml").read_text())["recipe"]["extends"] == "base.toml"
    outcome = cli("validate", "mine/new.toml")
    assert outcome.code == 0, outcome.err


@pytest.mark.usefixtures("clean_environment")
def test_nothing_heavy_is_imported() -> None:
    assert not HEAVY & imported("convert", str(DATA / "accelerate" / "own_deepspeed_file.yaml"))
