"""Where the values of a recipe come from: command line > environment > recipe > what it extends > default."""

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.conftest import REPOSITORY, CommandLine
from titan_slurm.launch import create
from titan_slurm.launch.submit import Prepared

EXAMPLE = REPOSITORY / "tests" / "data" / "example.toml"


def write(name: str, text: str) -> None:
    """A recipe in the working directory."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(textwrap.dedent(text))


class Shown:
    """What `titan-slurm recipes show` prints: values, and behind each where it came from."""

    def __init__(self, text: str) -> None:
        self.tables: dict[str, Any] = tomli.loads(text)
        self.origins: dict[str, str] = {}
        section = ""
        for line in text.splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif "  # " in line:
                name, _, origin = line.rpartition("  # ")
                self.origins[f"{section}.{name.split(' = ')[0]}"] = origin

    def __getitem__(self, path: str) -> Any:
        section, _, field = path.partition(".")
        return self.tables[section][field]


def show(cli: CommandLine, recipe: str | Path, *settings: str, env: dict[str, str] | None = None) -> Shown:
    """The resolved recipe."""
    outcome = cli("recipes", "show", recipe, *(word for text in settings for word in ("--set", text)), env=env)
    assert outcome.code == 0, outcome.err
    return Shown(outcome.out)


def test_each_layer_wins_over_those_below_it(cli: CommandLine, prepare: Callable[..., Prepared]) -> None:
    write(
        "base.toml",
        """\
        [recipe]
        extends = "llama3_debug"
        [checkpointing]
        save_dir = "from-base"
        save_interval = 7
        keep_latest = 7
        [parallelism]
        tensor_parallel = 1
        [training]
        seq_len = 128
        """,
    )
    write(
        "child.toml",
        """\
        [recipe]
        extends = "base.toml"
        [checkpointing]
        save_dir = "from-child"
        save_interval = 8
        [parallelism]
        tensor_parallel = 1
        """,
    )
    variables = {"TORCHTITAN_CHECKPOINT_DIR": "from-environment", "TORCHTITAN_TP_SIZE": "1"}
    shown = show(cli, "child.toml", "checkpointing.save_dir=from-option", env=variables)

    assert shown["checkpointing.save_dir"] == "from-option"
    assert shown.origins["checkpointing.save_dir"] == "--set checkpointing.save_dir=from-option"
    assert shown.origins["parallelism.tensor_parallel"] == "environment TORCHTITAN_TP_SIZE"
    assert shown["checkpointing.save_interval"] == 8
    assert shown.origins["checkpointing.save_interval"] == "child.toml:5"
    assert shown["checkpointing.keep_latest"] == 7
    assert shown.origins["checkpointing.keep_latest"] == "base.toml:6"
    assert shown.origins["model.flavor"] == f"{REPOSITORY}/recipes/llama3_debug.toml:11"
    # A default was set by nobody; the plan that torchtitan gets has it all the same.
    assert "pipeline_parallel" not in shown.tables["parallelism"]
    assert prepare("child.toml").plan.torchtitan["parallelism.pipeline_parallel_degree"] == 1


def test_the_plan_keeps_where_each_value_came_from(
    prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("mine.toml", '[recipe]\nextends = "llama3_debug"\n[torchtitan.debug]\nprint_config = true\n')
    monkeypatch.setenv("TORCHTITAN_DP_SIZE", "2")
    values = prepare("mine.toml", "training.max_steps=3").plan.values
    assert values["training.max_steps"] == {"value": 3, "from": "--set training.max_steps=3"}
    assert values["parallelism.data_parallel"] == {"value": 2, "from": "environment TORCHTITAN_DP_SIZE"}
    assert values["torchtitan.debug.print_config"] == {"value": True, "from": "mine.toml:4"}
    assert values["training.seq_len"] == {"value": 256, "from": f"{REPOSITORY}/recipes/llama3_debug.toml:19"}


@pytest.mark.parametrize(
    ("variable", "text", "path", "value"),
    [
        ("TORCHTITAN_MODEL_NAME", "llama3", "model.name", "llama3"),
        ("TORCHTITAN_CHECKPOINT_DIR", "Some Where/1", "checkpointing.save_dir", "Some Where/1"),
        ("TORCHTITAN_TP_SIZE", "2", "parallelism.tensor_parallel", 2),
        ("TORCHTITAN_PP_SIZE", "2", "parallelism.pipeline_parallel", 2),
        ("TORCHTITAN_DP_SIZE", "2", "parallelism.data_parallel", 2),
        ("TORCHTITAN_GRADIENT_CHECKPOINTING", "True", "memory.gradient_checkpointing", True),
        ("TORCHTITAN_ACTIVATION_CHECKPOINTING", "selective", "memory.activation_checkpointing", "selective"),
        ("TORCHTITAN_ACTIVATION_CHECKPOINTING", "false", "memory.activation_checkpointing", False),
    ],
)
def test_each_variable_of_the_environment_sets_its_field(
    cli: CommandLine, variable: str, text: str, path: str, value: object
) -> None:
    shown = show(cli, "llama3_debug", env={variable: text})
    assert shown[path] == value
    assert shown.origins[path] == f"environment {variable}"
    assert f"comes from the environment {variable}" in cli("validate", "llama3_debug", env={variable: text}).err


def test_a_variable_that_is_empty_says_nothing(cli: CommandLine) -> None:
    shown = show(cli, "llama3_debug", env={"TORCHTITAN_TP_SIZE": "", "TORCHTITAN_CONFIG_PATH": ""})
    assert "parallelism" not in shown.tables


def test_the_environment_can_name_the_recipe_and_an_argument_wins(cli: CommandLine) -> None:
    write("mine.toml", '[recipe]\nextends = "llama3_debug"\n')
    variable = {"TORCHTITAN_CONFIG_PATH": "mine.toml"}
    assert Shown(cli("recipes", "show", env=variable).out)["recipe.name"] == "mine"
    assert Shown(cli("recipes", "show", "llama3_debug", env=variable).out)["recipe.name"] == "llama3_debug"


def test_the_nodes_of_the_command_line(prepare: Callable[..., Prepared], cli: CommandLine) -> None:
    outcome = cli("validate", "llama3_debug", "--nodes", "3", "--cluster", "slurm", "--set", "training.batch_size=1")
    assert outcome.code == 2  # 16 sequences are no multiple of 6 ranks.
    outcome = cli("validate", "llama3_debug", "--nodes", "2", "--cluster", "slurm")
    assert "4 cpu ranks on 2 nodes" in outcome.out
    assert prepare("llama3_debug", "slurm.nodes=2").plan.layout.nodes == 2


def test_extends_merges_table_by_table_and_says_nothing_of_itself(cli: CommandLine) -> None:
    write(
        "recipes/grandparent.toml",
        """\
        [recipe]
        name = "grandparent"
        version = "3.2.1"
        description = "the oldest"
        extends = "llama3_debug"
        [optimizer]
        beta1 = 0.5
        beta2 = 0.6
        [torchtitan.debug]
        print_config = true
        [torchtitan.comm]
        trace_buf_size = 1
        """,
    )
    # A path beside this file, and a name.
    write(
        "recipes/more/parent.toml",
        """\
        [recipe]
        version = "2.0.0"
        extends = "../grandparent.toml"
        [optimizer]
        beta2 = 0.7
        [torchtitan.comm]
        trace_buf_size = 2
        """,
    )
    write(
        "child.toml", '[recipe]\nextends = "recipes/more/parent.toml"\n[optimizer]\neps = 1e-6\n[wandb]\n[torchtitan]\n'
    )

    shown = show(cli, "child.toml")

    assert shown.tables["recipe"] == {"schema": 1, "name": "child", "version": "0.0.0", "description": ""}
    optimizer = shown.tables["optimizer"]
    assert (optimizer["beta1"], optimizer["beta2"], optimizer["eps"]) == (0.5, 0.7, 1e-6)
    assert optimizer["lr"] == 3e-3
    assert shown.tables["torchtitan"] == {"debug.print_config": True, "comm.trace_buf_size": 2}


def test_a_list_is_replaced_as_a_whole(cli: CommandLine) -> None:
    write("base.toml", '[recipe]\nextends = "llama3_debug"\n[wandb]\ntags = ["a", "b"]\n')
    write("child.toml", '[recipe]\nextends = "base.toml"\n[wandb]\ntags = ["c"]\n')
    assert show(cli, "child.toml")["wandb.tags"] == ["c"]


@pytest.mark.parametrize(
    ("below", "above"),
    [
        (("optimizer.lr", 1e-3), ("training.learning_rate", 2e-3)),
        (("training.learning_rate", 1e-3), ("optimizer.lr", 2e-3)),
        (("training.warmup_steps", 1), ("lr_schedule.warmup_steps", 2)),
        (("lr_schedule.warmup_steps", 1), ("training.warmup_steps", 2)),
        (("training.gradient_accumulation_steps", 2), ("training.global_batch_size", 8)),
        (("training.global_batch_size", 8), ("training.gradient_accumulation_steps", 2)),
        (("memory.gradient_checkpointing", True), ("memory.activation_checkpointing", False)),
        (("memory.activation_checkpointing", False), ("memory.gradient_checkpointing", True)),
    ],
)
def test_another_name_of_the_same_thing_wins_over_the_layer_below(
    cli: CommandLine, below: tuple[str, object], above: tuple[str, object]
) -> None:
    def recipe(extends: str, path: str, value: object) -> str:
        section, field = path.split(".")
        return f'[recipe]\nextends = "{extends}"\n[{section}]\n{field} = {str(value).lower()}\n'

    write("base.toml", recipe("llama3_debug", *below))
    write("child.toml", recipe("base.toml", *above))

    for shown in (show(cli, "child.toml"), show(cli, "base.toml", f"{above[0]}={str(above[1]).lower()}")):
        assert shown[above[0]] == above[1]
        section, field = below[0].split(".")
        assert field not in shown.tables.get(section, {})


@pytest.mark.parametrize(
    ("memory", "meaning"),
    [
        ({}, "selective"),
        ({"gradient_checkpointing": True}, "full"),
        ({"gradient_checkpointing": False}, "none"),
        ({"activation_checkpointing": True}, "full"),
        ({"activation_checkpointing": False}, "none"),
        ({"activation_checkpointing": "memory_budget"}, "memory_budget"),
        ({"gradient_checkpointing": True, "activation_checkpointing": "selective"}, "selective"),
        ({"gradient_checkpointing": False, "activation_checkpointing": "none"}, "none"),
    ],
)
def test_what_the_two_names_of_checkpointing_mean(
    prepare: Callable[..., Prepared], memory: dict[str, object], meaning: str
) -> None:
    settings = [f"memory.{name}={str(value).lower()}" for name, value in memory.items()]
    text = '[model]\nflavor = "debugmodel"\n[training]\nglobal_batch_size = 8\n[compile]\nenabled = true\n'
    write("mine.toml", text)
    assert prepare("mine.toml", *settings).plan.activation_checkpointing == meaning


def test_each_form_of_the_batch_gives_the_other(prepare: Callable[..., Prepared]) -> None:
    layout = prepare("llama3_debug", "training.global_batch_size=32").plan.layout
    assert (layout.data_parallel, layout.gradient_accumulation_steps) == (2, 4)
    layout = prepare("llama3_debug", "training.gradient_accumulation_steps=3").plan.layout
    assert layout.global_batch_size == 4 * 2 * 3
    # Half of the ranks hold the other half of the model: each of the rest does twice the work.
    layout = prepare("llama3_debug", "parallelism.tensor_parallel=2").plan.layout
    assert (layout.data_parallel, layout.global_batch_size, layout.gradient_accumulation_steps) == (1, 16, 4)


def test_the_example_is_valid_as_it_stands(cli: CommandLine, prepare: Callable[..., Prepared]) -> None:
    outcome = cli("validate", EXAMPLE, "--cluster", "slurm")
    assert outcome.code == 0, outcome.err
    assert "8 cuda ranks" in outcome.out
    plan = prepare(str(EXAMPLE)).plan
    assert plan.layout.world_size == 8
    assert (plan.layout.tensor_parallel, plan.layout.data_parallel) == (2, 4)
    assert plan.layout.global_batch_size == 4 * 4 * 8
    assert plan.optimizer["kwargs"]["lr"] == 3e-4
    assert plan.torchtitan["lr_scheduler.warmup_steps"] == 2000
    assert plan.activation_checkpointing == "full"


def test_a_smaller_run_of_the_example(prepare: Callable[..., Prepared]) -> None:
    plan = prepare(
        str(EXAMPLE),
        "slurm.gpus_per_node=0",
        "slurm.tasks_per_node=2",
        "parallelism.data_parallel=1",
        "model.embed_dim=64",
        "model.num_heads=4",
        "model.num_layers=2",
        "model.intermediate_size=128",
        "training.seq_len=64",
    ).plan
    assert plan.layout.world_size == 2
    assert plan.device == "cpu"
    assert plan.model["sizes"]["embed_dim"] == 64


def test_the_same_recipe_resolves_to_the_same(cli: CommandLine) -> None:
    first, second = (cli("recipes", "show", EXAMPLE).out for _ in range(2))
    assert first == second


AWKWARD = r"""
[recipe]
extends = "llama3_debug"
name = 'a "name"'
description = "a # no comment, a \"quote\", a \\ and ünïcode 🙂"
[wandb]
project = '''two
lines'''
group = "tab\tbell\u0007 \u2028 separator"
tags = ["a", "b # c", "]"]
[torchtitan]
profiler.enable_profiling = true
"metrics.save_tb_folder" = "it's"
checkpoint.exclude_from_loading = ["x", "y"]
[torchtitan.debug]
print_config = true
"""


def test_the_recipe_of_a_run_is_as_good_as_its_source(
    prepare: Callable[..., Prepared], clean_environment: Path
) -> None:
    write("mine.toml", AWKWARD)
    source = prepare("mine.toml", "wandb.entity=a\rb", "training.max_steps=3", "lr_schedule.decay_ratio=0.5")
    create.create(source.run, source.plan, source.resolved, source.script)
    # Nothing else of the source is needed any more.
    Path("mine.toml").unlink()

    again = prepare(str(clean_environment / "runs" / "mine" / "recipe.toml"), name="again")

    assert again.resolved.recipe.model_dump(exclude={"recipe"}) == source.resolved.recipe.model_dump(exclude={"recipe"})
    assert again.resolved.name == source.resolved.name == 'a "name"'
    assert again.resolved.recipe.recipe.description == source.resolved.recipe.recipe.description
    assert again.resolved.torchtitan == source.resolved.torchtitan
    assert again.resolved.torchtitan["metrics.save_tb_folder"] == "it's"
    assert again.resolved.recipe.wandb.project == "two\nlines"
    for name in ("layout", "model", "data", "optimizer", "activation_checkpointing", "wandb", "slurm"):
        assert getattr(again.plan, name) == getattr(source.plan, name)
    assert again.plan.torchtitan | {"checkpoint.folder": ""} == source.plan.torchtitan | {"checkpoint.folder": ""}


@pytest.mark.parametrize("recipe", ["llama3_debug", "llama3_8b", str(EXAMPLE)])
def test_a_resolved_recipe_shows_as_itself(cli: CommandLine, recipe: str) -> None:
    first = cli("recipes", "show", recipe).out
    Path("again.toml").write_text(first)
    assert tomli.loads(cli("recipes", "show", "again.toml").out) == tomli.loads(first)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("3", "training.max_steps", 3),
        ("250_000", "training.max_steps", 250_000),
        ("3e-4", "optimizer.lr", 3e-4),
        ("1", "optimizer.lr", 1),
        ("true", "compile.enabled", True),
        ("llama", "wandb.project", "llama"),
        ('"llama"', "wandb.project", "llama"),
        ('"12"', "wandb.project", "12"),
        ("two words", "wandb.project", "two words"),
        ("a=b=c", "wandb.project", "a=b=c"),
        ("", "wandb.entity", ""),
        (" padded ", "wandb.project", "padded"),
        ("x\nproject_2 = 3", "wandb.project", "x\nproject_2 = 3"),
        ('"x"\ny = 3', "wandb.project", '"x"\ny = 3'),
        ('["a", "b"]', "wandb.tags", ["a", "b"]),
        ("[]", "wandb.tags", []),
        ("full", "memory.activation_checkpointing", "full"),
        ("false", "memory.activation_checkpointing", False),
        ("1-00:00:00", "slurm.time", "1-00:00:00"),
        # A time of day, to TOML.
        ("01:30:00", "slurm.time", "01:30:00"),
        ("90", "slurm.time", 90),
        ("./here/1", "checkpointing.save_dir", "./here/1"),
    ],
)
def test_values_on_the_command_line_need_no_quotes(cli: CommandLine, text: str, path: str, value: object) -> None:
    assert show(cli, "llama3_debug", f"{path}={text}")[path] == value


def test_minutes_are_a_time_limit_for_sbatch(prepare: Callable[..., Prepared]) -> None:
    assert "#SBATCH --time=90\n" in prepare("llama3_debug", "slurm.time=90").script


def test_a_torchtitan_path_on_the_command_line(cli: CommandLine) -> None:
    write("mine.toml", '[recipe]\nextends = "llama3_debug"\n[torchtitan]\n"debug.print_config" = true\n')
    shown = show(cli, "mine.toml", "torchtitan.debug.print_config=false")
    assert shown.tables["torchtitan"] == {"debug.print_config": False}


def test_the_last_of_two_values_on_the_command_line_counts(cli: CommandLine) -> None:
    assert show(cli, "llama3_debug", "training.max_steps=3", "training.max_steps=4")["training.max_steps"] == 4


LINES = '''\
# A comment with [brackets] and key = 1
[recipe] # [not.this]
extends = "llama3_debug"
description = """
[training]
seq_len = 1
"""

[wandb]
tags = [
    "a", # max_steps = 3
    "[training]",
]
project = "p"   # line 14
checkpointing.nothing = 1

training.nothing = 1
["optimizer"]
"eps" = 0

[training]
nothing = { a = 1,  b = 2 }
'also nothing' = 1

[[memory.list]]
a = 1
[[memory.list]]
a = 2

[torchtitan . debug]
"no.such" = 1
'''
WRONG_LINES = {
    "'debug.no.such'": 31,
    "[wandb] has no field 'checkpointing'": 15,
    "[wandb] has no field 'training'": 17,
    "optimizer.eps = 0": 19,
    "[training] has no field 'nothing'": 22,
    "[training] has no field 'also nothing'": 23,
    "[memory] has no field 'list'": 25,
}


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order-mark"])
def test_the_line_of_a_mistake(cli: CommandLine, ending: str, mark: str) -> None:
    Path("bad.toml").write_bytes((mark + LINES).replace("\n", ending).encode())
    errors = cli("validate", "bad.toml").errors
    found = {
        what: int(error.split(": ")[0].removeprefix("bad.toml:"))
        for error in errors
        for what in WRONG_LINES
        if what in error
    }
    assert found == WRONG_LINES
    assert len(errors) == len(WRONG_LINES)


def test_the_line_of_an_inline_table_and_of_a_dotted_key(cli: CommandLine) -> None:
    write(
        "bad.toml",
        """\
        recipe = { extends = "llama3_debug" }
        training.seq_len = 0
        optimizer = { lr = 0, eps = 1e-8 }
        torchtitan.debug.nothing = 1
        """,
    )
    errors = cli("validate", "bad.toml").errors
    assert [error.split(": ")[0] for error in errors] == ["bad.toml:2", "bad.toml:3", "bad.toml:4"]


def test_characters_that_end_a_line_elsewhere_end_none_in_toml(cli: CommandLine) -> None:
    Path("bad.toml").write_text(
        '[recipe]\nextends = "llama3_debug"\ndescription = "a\u2028b\u0085c"\n[training]\nseq_len = 0\n',
        encoding="utf-8",
    )
    [error] = cli("validate", "bad.toml").errors
    assert error.startswith("bad.toml:5: ")


def test_a_recipe_without_a_recipe_section_has_the_name_of_its_file(cli: CommandLine) -> None:
    shutil.copyfile(EXAMPLE, "my.7b-model.toml")
    assert show(cli, "my.7b-model.toml")["recipe.name"] == "my.7b-model"
    assert show(cli, "./my.7b-model.toml")["recipe.schema"] == 1
