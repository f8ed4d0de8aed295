"""From a recipe file, what it extends, the environment and the command line to one checked recipe that knows where each
of its values came from."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from titan_slurm.errors import BadInputError, Problem, bad_input, did_you_mean
from titan_slurm.recipe import find, toml
from titan_slurm.recipe.layout import OPTIONAL_SIZES, SIZES, make_layout, missing_sizes
from titan_slurm.recipe.mapping import MAP_STYLE_DATASETS, activation_checkpointing, problem_with, torchtitan_schema
from titan_slurm.recipe.schema import Recipe, field_names, sections
from titan_slurm.recipe.toml import Key
from titan_slurm.run.plan import Layout

ENVIRONMENT: dict[str, Key] = {
    "TORCHTITAN_MODEL_NAME": ("model", "name"),
    "TORCHTITAN_CHECKPOINT_DIR": ("checkpointing", "save_dir"),
    "TORCHTITAN_TP_SIZE": ("parallelism", "tensor_parallel"),
    "TORCHTITAN_PP_SIZE": ("parallelism", "pipeline_parallel"),
    "TORCHTITAN_DP_SIZE": ("parallelism", "data_parallel"),
    "TORCHTITAN_GRADIENT_CHECKPOINTING": ("memory", "gradient_checkpointing"),
    "TORCHTITAN_ACTIVATION_CHECKPOINTING": ("memory", "activation_checkpointing"),
}
CONFIG_PATH_VARIABLE = "TORCHTITAN_CONFIG_PATH"

# Fields of which one says all: a layer that sets one of them replaces what the layers below say by any of them.
_ONE_THING: tuple[tuple[Key, ...], ...] = (
    (("training", "learning_rate"), ("optimizer", "lr")),
    (("training", "warmup_steps"), ("lr_schedule", "warmup_steps")),
    (("training", "global_batch_size"), ("training", "gradient_accumulation_steps")),
    (("memory", "gradient_checkpointing"), ("memory", "activation_checkpointing")),
)


@dataclass(frozen=True)
class Value:
    """A value and where it came from: `file:line`, `--set`, `environment NAME` or `default`."""

    value: Any
    origin: str


@dataclass(frozen=True)
class ResolvedRecipe:
    """A checked recipe with the layout it has on its own number of nodes."""

    name: str
    found: find.Found
    recipe: Recipe
    layout: Layout
    values: dict[Key, Value]
    """Every value that was set somewhere, `[torchtitan]` included."""

    @property
    def torchtitan(self) -> dict[str, Any]:
        """The recipe's `[torchtitan]` by dotted path."""
        return {".".join(key[1:]): value.value for key, value in self.values.items() if key[0] == "torchtitan"}


@dataclass(frozen=True)
class Override:
    """A value from the command line and the option that gave it."""

    key: Key
    value: Any
    option: str


def parse_set(text: str) -> Override:
    """`section.key=value` of `--set`. Raises BadInputError if it is not of that form."""
    name, equals, value = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or len(key) < 2 or not all(key):
        raise bad_input(f"--set {text}", "is not of the form section.key=value", "e.g. --set training.max_steps=100")
    if key == ("recipe", "extends"):
        raise bad_input(f"--set {text}", "what a recipe extends is said in its file", "make a recipe that extends it")
    return Override(key, toml.parse_value(value.strip()), f"--set {text}")


def resolve(
    name: str | None, overrides: Iterable[Override] = (), environment: Mapping[str, str] = os.environ
) -> ResolvedRecipe:
    """Find, read, merge and check a recipe; `name` may be left out where the environment names one.

    Raises BadInputError with every problem that was found.
    """
    name = name or environment.get(CONFIG_PATH_VARIABLE)
    if not name:
        raise bad_input("", "no recipe was named", f"give a recipe, or set {CONFIG_PATH_VARIABLE}")
    found = find.recipe_file(name)
    merged: dict[Key, Value] = {}
    problems: list[Problem] = []
    for file in _with_bases(found):
        # What a base says of itself (its name, its version) is not said of the recipe that extends it.
        about, merged = _split(merged, "recipe")
        _validate(about, problems)
        _lay_over(merged, _file_layer(file))
    for layer in (_environment_layer(environment), _override_layer(overrides)):
        _lay_over(merged, layer)
    recipe = _validate(merged, problems)
    problems += _torchtitan_problems(merged, activation_checkpointing(recipe) if recipe else None)
    layout = _check(recipe, found.path, merged, problems) if recipe else None
    if problems or recipe is None or layout is None:
        raise BadInputError(problems)
    recipe_name = recipe.recipe.name or found.name
    return ResolvedRecipe(recipe_name, found, recipe, layout, merged)


def _with_bases(found: find.Found) -> list[toml.TomlFile]:
    """The recipe's file and what it extends, the farthest base first."""
    files: list[toml.TomlFile] = []
    seen: list[Path] = []
    while True:
        files.insert(0, toml.read(found.path))
        seen.append(found.path.resolve())
        file = files[0]
        about = file.tables.get("recipe")
        base = about.get("extends") if isinstance(about, dict) else None
        if not isinstance(base, str):
            return files
        where = file.where(("recipe", "extends"))
        try:
            found = find.recipe_file(base, beside=file.path.parent)
        except BadInputError as error:
            raise BadInputError(
                Problem(where, f"extends {p.where!r}: {p.what}", p.hint) for p in error.problems
            ) from None
        if found.path.resolve() in seen:
            chain = " → ".join(path.name for path in (*seen, found.path))
            raise bad_input(where, f"the recipe extends itself: {chain}")


def _file_layer(file: toml.TomlFile) -> dict[Key, Value]:
    known = sections()
    layer: dict[Key, Value] = {}
    for key, value in toml.flatten(file.tables).items():
        is_section = len(key) == 1 and key[0] in known
        if value == {} and (is_section or key[0] == "torchtitan"):
            continue  # A table without keys says nothing.
        # A torchtitan path is the same in quotes and without.
        path = tuple(".".join(key).split(".")) if key[0] == "torchtitan" else key
        layer[path] = Value(value, file.where(key if key[0] in known else key[:1]))
    return layer


def _split(merged: dict[Key, Value], section: str) -> tuple[dict[Key, Value], dict[Key, Value]]:
    """The values of a section, and all others."""
    inside = {key: value for key, value in merged.items() if key[0] == section}
    return inside, {key: value for key, value in merged.items() if key[0] != section}


def _environment_layer(environment: Mapping[str, str]) -> dict[Key, Value]:
    return {
        key: Value(_plain(key, environment[variable]), f"environment {variable}")
        for variable, key in ENVIRONMENT.items()
        if environment.get(variable)
    }


def _plain(key: Key, text: str) -> Any:
    """A value of the environment: text for fields that are text, and Python's True and False are as good as TOML's."""
    if key in (("model", "name"), ("checkpointing", "save_dir")):
        return text
    return toml.parse_value(text.lower())


def _override_layer(overrides: Iterable[Override]) -> dict[Key, Value]:
    return {override.key: Value(override.value, override.option) for override in overrides}


def _lay_over(merged: dict[Key, Value], layer: dict[Key, Value]) -> None:
    """Put a layer over those below it."""
    for group in _ONE_THING:
        if any(key in layer for key in group):
            for key in group:
                merged.pop(key, None)
    for key, value in layer.items():
        # A table over a value, or a value over a table, replaces it.
        for other in [other for other in merged if other[: len(key)] == key or key[: len(other)] == other]:
            del merged[other]
        merged[key] = value


def _validate(merged: dict[Key, Value], problems: list[Problem]) -> Recipe | None:
    """Sections, keys and types. Returns None where a recipe cannot be made; adds what is wrong to `problems`."""
    known = sections()
    tables: dict[str, dict[str, Any]] = {}
    unknown: set[str] = set()
    for key, value in merged.items():
        if key[0] not in known:
            if key[0] not in unknown:
                problems.append(Problem(value.origin, f"unknown section [{key[0]}]", did_you_mean(key[0], known)))
            unknown.add(key[0])
        elif len(key) == 1:
            problems.append(Problem(value.origin, f"{key[0]} is a section, not a value", f"write [{key[0]}]"))
        elif key[0] != "torchtitan":
            _put(tables.setdefault(key[0], {}), key[1:], value.value)
    parts: dict[str, Any] = {}
    for name, section in known.items():
        if section is None or name not in tables:
            continue
        try:
            parts[name] = section.model_validate(tables[name])
        except pydantic.ValidationError as error:
            problems.extend(_problems_of_section(name, error, merged))
    return None if problems else Recipe(**parts)


def _put(table: dict[str, Any], key: Key, value: Any) -> None:
    for name in key[:-1]:
        table = table.setdefault(name, {})
    table[key[-1]] = value


def _problems_of_section(name: str, error: pydantic.ValidationError, merged: dict[Key, Value]) -> Iterable[Problem]:
    by_field: dict[str, list[Any]] = {}
    for detail in error.errors():
        by_field.setdefault(str(detail["loc"][0]), []).append(detail)
    for field, details in by_field.items():
        where = next(value.origin for key, value in merged.items() if key[:2] == (name, field))
        if details[0]["type"] == "extra_forbidden":
            yield Problem(where, f"[{name}] has no field {field!r}", _hint_for_field(name, field))
        else:
            # A union reports one error per alternative; together they are one mistake.
            wanted = " or ".join(dict.fromkeys(_wanted(detail) for detail in details))
            yield Problem(where, f"{name}.{field} = {_shown(merged, (name, field))}: {wanted}")


def _hint_for_field(section: str, field: str) -> str:
    """The nearest field of the section, or the section that has such a field."""
    known = {name: field_names(kind) for name, kind in sections().items() if kind is not None}
    elsewhere = [name for name, names in known.items() if field in names and name != section]
    if elsewhere:
        return f"there is {elsewhere[0]}.{field}"
    return did_you_mean(field, known[section])


def _wanted(detail: Any) -> str:
    match detail["type"]:
        case "int_type" | "int_from_float" | "int_parsing":
            return "must be a whole number"
        case "float_type" | "float_parsing":
            return "must be a number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "string_type":
            return "must be text in quotes"
        case "list_type":
            return "must be a list"
        case "greater_than":
            return f"must be greater than {detail['ctx']['gt']}"
        case "greater_than_equal":
            return f"must be at least {detail['ctx']['ge']}"
        case "less_than":
            return f"must be less than {detail['ctx']['lt']}"
        case "less_than_equal":
            return f"must be at most {detail['ctx']['le']}"
        case "literal_error":
            return f"must be {detail['ctx']['expected']}"
        case "string_too_short":
            return "must not be empty"
        case "value_error":
            return str(detail["ctx"]["error"])
        case _:
            return str(detail["msg"])


def _shown(merged: dict[Key, Value], key: Key) -> str:
    values = [value.value for other, value in merged.items() if other == key]
    return repr(values[0]) if values else "a table"


def _torchtitan_problems(merged: dict[Key, Value], activation_checkpointing: str | None) -> Iterable[Problem]:
    for key, value in merged.items():
        if key[0] == "torchtitan" and len(key) > 1:
            wrong = problem_with(".".join(key[1:]), value.value, activation_checkpointing)
            if wrong:
                yield Problem(value.origin, *wrong)


def _check(recipe: Recipe, path: Path, merged: dict[Key, Value], problems: list[Problem]) -> Layout | None:
    """Everything that takes more than one field to see."""

    def problem(section: str, field: str, what: str, hint: str = "") -> None:
        origin = merged[(section, field)].origin if (section, field) in merged else str(path)
        problems.append(Problem(origin, f"{section}.{field}: {what}", hint))

    _check_one_thing(recipe, problem)
    _check_model_name(recipe, problem)
    _check_data(recipe, problem)
    schedules = torchtitan_schema()["pipeline_schedules"]
    if recipe.parallelism.pipeline_schedule not in schedules:
        hint = did_you_mean(recipe.parallelism.pipeline_schedule, schedules)
        problem("parallelism", "pipeline_schedule", f"no schedule {recipe.parallelism.pipeline_schedule!r}", hint)
    if recipe.checkpointing.keep_latest == 1:
        problem("checkpointing", "keep_latest", "must be 0 (all) or at least 2: one of them may be half-written")
    layout, misfits = make_layout(recipe)
    for misfit in misfits:
        problem(*misfit.field, misfit.what, misfit.hint)
    return layout


def _check_one_thing(recipe: Recipe, problem: Any) -> None:
    training, memory = recipe.training, recipe.memory
    pairs = (
        ("training", "learning_rate", training.learning_rate, "optimizer.lr", recipe.optimizer.lr),
        (
            "training",
            "warmup_steps",
            training.warmup_steps,
            "lr_schedule.warmup_steps",
            recipe.lr_schedule.warmup_steps,
        ),
    )
    for section, field, value, other_name, other in pairs:
        if value is not None and other is not None and value != other:
            problem(section, field, f"{value} contradicts {other_name} = {other}; they are one thing", "keep one")
    asked, how = memory.gradient_checkpointing, memory.activation_checkpointing
    if asked is not None and how is not None and asked != (how not in (False, "none")):
        text = f"{str(asked).lower()} contradicts memory.activation_checkpointing = {str(how).lower()}"
        problem("memory", "gradient_checkpointing", text, "keep one")
    if training.global_batch_size is not None and training.gradient_accumulation_steps is not None:
        problem(
            "training",
            "global_batch_size",
            "given together with gradient_accumulation_steps; either follows from the other",
            "keep one",
        )
    elif training.global_batch_size is None and training.gradient_accumulation_steps is None:
        problem(
            "training", "global_batch_size", "neither it nor gradient_accumulation_steps is given", "give one of them"
        )


def _check_model_name(recipe: Recipe, problem: Any) -> None:
    model, families = recipe.model, torchtitan_schema()["models"]
    sizes = [name for name in (*SIZES, *OPTIONAL_SIZES) if getattr(model, name) is not None]
    if model.name not in families:
        problem("model", "name", f"no model family {model.name!r}", did_you_mean(model.name, families))
    elif model.flavor and model.flavor not in families[model.name]:
        hint = did_you_mean(model.flavor, families[model.name])
        problem("model", "flavor", f"{model.name} has no flavor {model.flavor!r}", hint)
    if model.flavor and sizes:
        problem(
            "model", sizes[0], f"given together with model.flavor = {model.flavor!r}, which has its own", "keep one"
        )
    if not model.flavor and model.name in families:
        missing = missing_sizes(recipe)
        if model.name != "llama3":
            problem("model", "flavor", f"{model.name} needs one", did_you_mean("", families[model.name]))
        elif missing:
            hint = f"or give all sizes; still missing: {', '.join(missing)}" if sizes else "e.g. flavor = '8B'"
            problem("model", "flavor", "no flavor is given", hint)


def _check_data(recipe: Recipe, problem: Any) -> None:
    data = recipe.data
    known = [*torchtitan_schema()["datasets"], *MAP_STYLE_DATASETS]
    if data.dataset not in known:
        problem("data", "dataset", f"no dataset {data.dataset!r}", did_you_mean(data.dataset, known))
    if data.num_workers > 1 and data.dataset == "c4_test":
        problem(
            "data",
            "num_workers",
            "each worker would yield the whole of a local dataset: data would be repeated",
            "0 or 1",
        )
    if data.dataset == "python_docs" and data.dataset_path:
        problem("data", "dataset_path", "python_docs is built in and has no path", "leave one out")
    if data.dataset in ("text", "tokens") and not data.dataset_path:
        what = "a file or folder of text" if data.dataset == "text" else "the assets/tokens folder of a run"
        problem("data", "dataset_path", f"data.dataset = {data.dataset!r} needs one", what)
