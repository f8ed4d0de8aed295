"""What recipes and cluster profiles have in common: types of fields, what may be asked of Slurm, and what to say of a
value that does not fit."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from titan_slurm.errors import Problem, did_you_mean
from titan_slurm.toml import Key

Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]


def matching(pattern: str, wanted: str) -> AfterValidator:
    """Text of that form, with a message for people where it is not."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {wanted}")
        return text

    return AfterValidator(check)


Version = Annotated[str, matching(r"\d+\.\d+\.\d+", "three numbers, e.g. 1.0.0")]
# Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds] (sbatch(1)).
# Minutes, and megabytes below, may be given as a plain number.
SlurmTime = Annotated[
    str,
    Field(coerce_numbers_to_str=True),
    matching(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}", "a time as sbatch takes it, e.g. 1-00:00:00"),
]
Memory = Annotated[
    str, Field(coerce_numbers_to_str=True), matching(r"\d+[KMGT]?", "a size as sbatch takes it, e.g. 500G")
]
# Stands in a line of the batch script.
Line = Annotated[
    str, Field(coerce_numbers_to_str=True), matching(r"[^\x00-\x1f\x7f]+", "one line of text, and not empty")
]


def megabytes(memory: str) -> float:
    """What sbatch takes a size for: without a unit it is in megabytes."""
    units = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
    return float(memory.rstrip("KMGT")) * units.get(memory[-1], 1.0)


# Options of sbatch that a run needs as they are: its script, its log and its coming back hang on them.
_OURS = {
    "array",
    "clusters",
    "comment",
    "error",
    "input",
    "job-name",
    "no-requeue",
    "ntasks",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "test-only",
    "wait",
    "wrap",
}
_FIELD_OF_OPTION = {
    "nodes": "slurm.nodes",
    "ntasks-per-node": "slurm.tasks_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "cpus-per-task": "slurm.cpus_per_task",
    "signal": "slurm.signal_lead",
    **{
        name: f"slurm.{name}"
        for name in ("mem", "time", "partition", "account", "qos", "constraint", "reservation", "exclusive")
    },
}
_OURS_OF_SRUN = {"error", "kill-on-bad-exit", "multi-prog", "nodes", "ntasks", "output", "pty"}


def _sbatch_option(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError("must be the long name of an option of sbatch, without dashes before it, e.g. wckey")
    if name in _FIELD_OF_OPTION:
        raise ValueError(f"has a field of its own: {_FIELD_OF_OPTION[name]}")
    if name in _OURS:
        raise ValueError("is set by titan-slurm itself")
    return name


def _srun_argument(text: str) -> str:
    found = re.fullmatch(r"--([a-z][a-z0-9-]*)(=[^\x00-\x1f\x7f]*)?", text)
    if not found:
        raise ValueError("must be long options, each with its value, e.g. --mpi=none")
    if found[1] in _OURS_OF_SRUN:
        raise ValueError(f"--{found[1]} is set by titan-slurm itself")
    return text


class Section(BaseModel):
    """A table of a recipe or a profile: unknown keys are errors, every field may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(Section):
    """What may be asked of any Slurm: by a recipe, or by a cluster profile for the recipes that do not say."""

    cpus_per_task: Positive | None = None
    mem: Memory | None = Field(None, description="memory per node, e.g. 500G")
    time: SlurmTime | None = Field(None, description="limit of one attempt, as sbatch takes it, e.g. 1-00:00:00")
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    reservation: Line | None = None
    exclusive: Flag = False
    signal_lead: Annotated[int, Field(ge=10, le=65535, strict=True)] = Field(
        120, description="seconds before the time limit at which the ranks are asked to stop and save"
    )
    sbatch: dict[Annotated[str, AfterValidator(_sbatch_option)], Flag | Line] = Field(
        default_factory=dict,
        description="any other option of sbatch by its long name; true: one without a value; false: not that one",
    )
    preflight: Flag = Field(
        False,
        description="before each attempt look at every node for some seconds: GPUs, shared folder, network, versions; "
        "a bad one ends the attempt, and the next ones leave it out",
    )
    srun: list[Annotated[str, Field(strict=True), AfterValidator(_srun_argument)]] = Field(
        default_factory=list, description="more options of srun, e.g. --mpi=none; a profile's come first"
    )


Kind = type[BaseModel]


def field_names(section: Kind) -> list[str]:
    """The keys of a section as they stand in TOML."""
    return [field.alias or name for name, field in section.model_fields.items()]


def check_sections(
    known: Mapping[str, Kind | None], given: Mapping[Key, tuple[Any, str]]
) -> tuple[dict[str, BaseModel], list[Problem]]:
    """Sections, keys and types of what was given: each key with its value and where it stands.

    Returns the sections of which anything is given, and every problem. A section that is known as None is passed over.
    """
    problems: list[Problem] = []
    tables: dict[str, dict[str, Any]] = {}
    unknown: set[str] = set()
    for key, (value, where) in given.items():
        if key[0] not in known:
            if key[0] not in unknown:
                problems.append(Problem(where, f"unknown section [{key[0]}]", did_you_mean(key[0], known)))
            unknown.add(key[0])
        elif len(key) == 1:
            problems.append(Problem(where, f"{key[0]} is a section, not a value", f"write [{key[0]}]"))
        elif known[key[0]] is not None:
            _put(tables.setdefault(key[0], {}), key[1:], value)
    parts: dict[str, BaseModel] = {}
    for name, section in known.items():
        if section is None or name not in tables:
            continue
        try:
            parts[name] = section.model_validate(tables[name])
        except pydantic.ValidationError as error:
            problems.extend(_problems_of_section(name, error, known, given))
    return parts, problems


def _put(table: dict[str, Any], key: Key, value: Any) -> None:
    for name in key[:-1]:
        table = table.setdefault(name, {})
    table[key[-1]] = value


def _problems_of_section(
    name: str,
    error: pydantic.ValidationError,
    known: Mapping[str, Kind | None],
    given: Mapping[Key, tuple[Any, str]],
) -> Iterable[Problem]:
    by_key: dict[Key, list[Any]] = {}
    for detail in error.errors():
        by_key.setdefault(_given_key((name, *map(str, detail["loc"])), given), []).append(detail)
    for key, details in by_key.items():
        # What is missing stands nowhere: then it is said of its section.
        near = (where for part in (key, key[:1]) for other, (_, where) in given.items() if other[: len(part)] == part)
        where = next(near)
        if details[0]["type"] == "extra_forbidden":
            yield Problem(where, f"[{name}] has no field {key[1]!r}", _hint_for_field(name, key[1], known))
        elif details[0]["type"] == "missing":
            yield Problem(where, f"{'.'.join(key)} is missing")
        else:
            # A union reports one error per alternative; together they are one mistake.
            wanted = " or ".join(dict.fromkeys(_wanted(detail) for detail in details))
            shown = repr(given[key][0]) if key in given else "a table"
            yield Problem(where, f"{'.'.join(key)} = {shown}: {wanted}")


def _given_key(location: Key, given: Collection[Key]) -> Key:
    """The key that an error is about. Below it, a location goes on into lists and alternatives of a union."""
    keys = (location[:length] for length in range(len(location), 1, -1))
    return next((key for key in keys if key in given), location[:2])


def _hint_for_field(section: str, field: str, known: Mapping[str, Kind | None]) -> str:
    """The nearest field of the section, or the section that has such a field."""
    names = {name: field_names(kind) for name, kind in known.items() if kind is not None}
    elsewhere = [name for name, fields in names.items() if field in fields and name != section]
    if elsewhere:
        return f"there is {elsewhere[0]}.{field}"
    return did_you_mean(field, names[section])


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
        case "string_too_short" | "too_short":
            return "must not be empty"
        case "value_error":
            return str(detail["ctx"]["error"])
        case _:
            return str(detail["msg"])
