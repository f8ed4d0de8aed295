"""From a recipe file, what it extends, the environment and the command line to one checked recipe that knows where each
of its values came from."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_slurm import toml
from titan_slurm.errors import BadInputError, Problem, bad_input, did_you_mean
from titan_slurm.fields import check_sections
from titan_slurm.recipe import find, hf_config
from titan_slurm.recipe.layout import make_layout
from titan_slurm.recipe.mapping import MAP_STYLE_DATASETS, activation_checkpointing, problem_with, torchtitan_schema
from titan_slurm.recipe.model import OPTIONAL_SIZES, SIZES, TRANSFORMERS, missing_sizes
from titan_slurm.recipe.schema import Recipe, sections
from titan_slurm.run.plan import Layout
from titan_slurm.toml import Key

ENVIRONMENT: dict[str, Key] = {
    "TORCHTITAN_MODEL_NAME": ("model", "name"),
    "TORCHTITAN_CHECKPOINT_DIR": ("checkpointing", "save_dir"),
    "TORCHTITAN_TP_SIZE": ("parallelism", "tensor_parallel"),
    "TORCHTITAN_PP_SIZE": ("parallelism", "pipeline_parallel"),
    "TORCHTITAN_DP_SIZE": ("parallelism", "data_parallel"),
    "TORCHTITAN_GRADIENT_CHECKPOINTING": ("memory", "gradient_checkpointing"),
    "TORCHTITAN_ACTIVATION_CHECKPOINTING": ("memory", "activation_checkpointing"),
    # By these a user, or a site for all of its users, tells sbatch what to ask for.
    "SBATCH_ACCOUNT": ("slurm", "account"),
    "SBATCH_CONSTRAINT": ("slurm", "constraint"),
    "SBATCH_PARTITION": ("slurm", "partition"),
    "SBATCH_QOS": ("slurm", "qos"),
    "SBATCH_RESERVATION": ("slurm", "reservation"),
    "SBATCH_TIMELIMIT": ("slurm", "time"),
}
CONFIG_PATH_VARIABLE = "TORCHTITAN_CONFIG_PATH"
# Where values stand that a program hands over as tables.
TABLES = "job_config"

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
    of_place: bool = False
    """Said by the place where the run is to be, not by the recipe: another place says something else."""


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
    name: str | Mapping[str, Any] | None,
    overrides: Iterable[Override] = (),
    environment: Mapping[str, str] = os.environ,
    beneath: Mapping[Key, Value] | None = None,
    *,
    own_model: bool = False,
) -> ResolvedRecipe:
    """Find, read, merge and check a recipe; `name` may be left out where the environment names one, or be a recipe's
    tables themselves. What lies `beneath` holds where nothing else is said. `own_model`: a script makes its model
    itself, and the recipe need not name one.

    Raises BadInputError with every problem that was found.
    """
    name = name or environment.get(CONFIG_PATH_VARIABLE)
    if not name:
        raise bad_input("", "no recipe was named", f"give a recipe, or set {CONFIG_PATH_VARIABLE}")
    if isinstance(name, str):
        found = find.recipe_file(name)
        first = toml.read(found.path)
    else:
        found = find.Found(Path(TABLES), "path")
        first = toml.TomlFile(found.path, dict(name), {})
    merged = dict(beneath or {})
    problems: list[Problem] = []
    for file in _with_bases(first):
        # What a base says of itself (its name, its version) is not said of the recipe that extends it.
        about, merged = _split(merged, "recipe")
        problems += _parts(about)[1]
        _lay_over(merged, _file_layer(file))
    for layer in (_environment_layer(environment), _override_layer(overrides)):
        _lay_over(merged, layer)
    recipe = _validate(merged, problems)
    problems += _torchtitan_problems(merged, activation_checkpointing(recipe) if recipe else None)
    layout = _check(recipe, found.path, merged, problems, own_model=own_model) if recipe else None
    if problems or recipe is None or layout is None:
        raise BadInputError(problems)
    recipe_name = recipe.recipe.name or found.name
    return ResolvedRecipe(recipe_name, found, recipe, layout, merged)


def with_defaults(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """The same recipe with the value of every field, section by section; a field that nobody set has the origin
    `default`, and is left out where its default is nothing."""
    values: dict[Key, Value] = {}
    for name, section in sections().items():
        given = {key: value for key, value in resolved.values.items() if key[0] == name}
        for field, info in section.model_fields.items() if section else ():
            path = (name, info.alias or field)
            if not any(key[:2] == path for key in given):
                default = info.get_default(call_default_factory=True)
                given |= {} if default in (None, {}) else {path: Value(default, "default")}
        values |= given
    return replace(resolved, values=values)


def origin(values: Mapping[Key, Value], key: Key) -> str | None:
    """Where a field was set, or the nearest table around it within its section; None if it was set nowhere."""
    tables = (key[:length] for length in range(len(key), 1, -1))
    return next((value.origin for table in tables for at, value in values.items() if at[: len(table)] == table), None)


def _with_bases(file: toml.TomlFile) -> list[toml.TomlFile]:
    """The recipe and what it extends, the farthest base first."""
    files: list[toml.TomlFile] = []
    seen: list[Path] = []
    while True:
        files.insert(0, file)
        seen.append(file.path.resolve())
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
        file = toml.read(found.path)


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
    if key in (("model", "name"), ("checkpointing", "save_dir")) or key[0] == "slurm":
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
    parts, wrong = _parts(merged)
    problems += wrong
    return None if problems else Recipe(**parts)


def _parts(merged: dict[Key, Value]) -> tuple[dict[str, Any], list[Problem]]:
    """The sections of which anything is said, and what is wrong with them."""
    return check_sections(sections(), {key: (value.value, value.origin) for key, value in merged.items()})


def _torchtitan_problems(merged: dict[Key, Value], activation_checkpointing: str | None) -> Iterable[Problem]:
    for key, value in merged.items():
        if key[0] == "torchtitan" and len(key) > 1:
            wrong = problem_with(".".join(key[1:]), value.value, activation_checkpointing)
            if wrong:
                yield Problem(value.origin, *wrong)


def _check(
    recipe: Recipe, path: Path, merged: dict[Key, Value], problems: list[Problem], *, own_model: bool
) -> Layout | None:
    """Everything that takes more than one field to see."""

    def problem(section: str, field: str, what: str, hint: str = "") -> None:
        where = origin(merged, (section, *field.split("."))) or str(path)
        problems.append(Problem(where, f"{section}.{field}: {what}", hint))

    _check_one_thing(recipe, problem)
    if not own_model or any(key[0] == "model" for key in merged):
        _check_model_name(recipe, problem)
    _check_data(recipe, problem)
    schedules = torchtitan_schema()["pipeline_schedules"]
    if recipe.parallelism.pipeline_schedule not in schedules:
        hint = did_you_mean(recipe.parallelism.pipeline_schedule, schedules)
        problem("parallelism", "pipeline_schedule", f"no schedule {recipe.parallelism.pipeline_schedule!r}", hint)
    if recipe.checkpointing.keep_latest == 1:
        problem("checkpointing", "keep_latest", "must be 0 (all) or at least 2: one of them may be half-written")
    torchtitan = {".".join(key[1:]): value.value for key, value in merged.items() if key[0] == "torchtitan"}
    layout, misfits = make_layout(recipe, torchtitan)
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
    if model.initial_weights and recipe.checkpointing.resume_from_checkpoint:
        problem("model", "initial_weights", "contradicts checkpointing.resume_from_checkpoint", "keep one")
    if model.name == TRANSFORMERS:
        return _check_transformers(recipe, sizes, problem)
    if model.config is not None:
        problem("model", "config", f"has no meaning for {model.name}", f'write name = "{TRANSFORMERS}"')
    if model.name not in families:
        hint = did_you_mean(model.name, [*families, TRANSFORMERS])
        problem("model", "name", f"no model family {model.name!r}", hint)
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
    return None


def _check_transformers(recipe: Recipe, sizes: list[str], problem: Any) -> None:
    model, parallelism = recipe.model, recipe.parallelism
    for field in [*(["flavor"] if model.flavor else []), *sizes]:
        problem("model", field, f"has no meaning for {TRANSFORMERS}", "it is said in model.config")
    if parallelism.context_parallel > 1:
        problem("parallelism", "context_parallel", f"not with model.name = {TRANSFORMERS!r}", "it must be 1")
    if model.config is None:
        hint = "a folder with a Hugging Face config.json, or a table [model.config]"
        problem("model", "config", f"{TRANSFORMERS} needs one", hint)
        return
    try:
        contents = hf_config.load(model.config)
    except hf_config.NoConfigError:
        return  # The plan, which is made where the run is to be, tells.
    except hf_config.ConfigError as error:
        problem("model", error.field, error.what, error.hint)
        return
    if parallelism.pipeline_parallel > 1 and len(set(hf_config.layer_types(contents))) > 1:
        what = "not with layers of different attention: a stage would take its layers for the model's first ones"
        problem("parallelism", "pipeline_parallel", what, "it must be 1")


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
