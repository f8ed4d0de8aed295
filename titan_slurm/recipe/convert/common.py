"""What the source formats share: the fields of a file, and the recipe that grows out of them. A field is settled when a
value of the recipe came from it or when the report says why none did; `Conversion.finish` reports whatever is left, so
that no field can be lost in silence."""

import enum
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from titan_slurm.errors import bad_input
from titan_slurm.fields import check_sections
from titan_slurm.recipe.schema import sections
from titan_slurm.toml import Key

AUTO = "auto"


class Fate(enum.Enum):
    """Why a field has no counterpart; the value is the heading of its part of the report."""

    LOST = "To look at: the recipe does not do this"
    UNKNOWN = "Unknown: no field that this conversion knows"
    AUTO = 'Decided by the Trainer ("auto"): here the recipe that this one extends decides, or the default'
    NOT_NEEDED = "Not needed here"


@dataclass(frozen=True, eq=False)
class SourceField:
    """A value of the source file that is no table, and its name there, as people read it."""

    name: str
    value: Any

    @property
    def shown(self) -> str:
        """`name = value`, in one line without control characters."""
        try:
            text = json.dumps(self.value, ensure_ascii=False, default=str)
        except (TypeError, ValueError):
            text = repr(self.value)  # YAML has keys that are no text, and lists that contain themselves.
        return f"{self.name} = {printable(text)}"


class Fields:
    """The fields of a source file by their keys. A key need not be the field's name: where two formats mean the same,
    one is looked up under the other's keys."""

    def __init__(self, by_key: dict[Key, SourceField]) -> None:
        self._by_key = by_key

    def get(self, path: str) -> SourceField | None:
        """The field at a dotted path."""
        return self._by_key.get(tuple(path.split(".")))

    def below(self, path: str) -> list[SourceField]:
        """The fields in the table at a dotted path; or the field there, if it is no table."""
        prefix = tuple(path.split("."))
        return [found for key, found in self._by_key.items() if key[: len(prefix)] == prefix]

    def items(self) -> Iterable[tuple[Key, SourceField]]:
        """All keys and fields."""
        return self._by_key.items()

    def renamed(self, rename: Callable[[Key], Key]) -> "Fields":
        """The same fields by other keys. Where two would have the same one, it is that of the field whose name it is;
        no field is left out."""
        by_key = {key: found for key, found in self._by_key.items() if rename(key) == key}
        for key, found in self._by_key.items():
            if rename(key) != key:
                free = (rename(key), key, (*key, f"beside {len(by_key)}"))
                by_key[next(candidate for candidate in free if candidate not in by_key)] = found
        return Fields(by_key)

    def __iter__(self) -> Iterator[SourceField]:
        return iter(self._by_key.values())


def fields_of(tree: dict[str, Any], where: str, *, said_before: str = "") -> Fields:
    """All fields of nested tables. A list is one field. `said_before` begins every name.

    Raises BadInputError, with the place `where`, for what YAML allows: a table that contains itself, and two names that
    are the same as text.
    """
    by_key: dict[Key, SourceField] = {}
    open_tables: list[int] = []

    def walk(table: dict[str, Any], prefix: Key) -> None:
        if id(table) in open_tables:
            raise bad_input(where, f"{'.'.join(prefix)} contains itself")
        open_tables.append(id(table))
        for name, value in table.items():
            key = (*prefix, str(name))
            if isinstance(value, dict) and value:
                walk(value, key)
            elif key in by_key:
                raise bad_input(where, f"the field {'.'.join(key)} is given twice", "keep one")
            else:
                by_key[key] = SourceField(said_before + ".".join(map(_quoted, key)), value)
        open_tables.pop()

    walk(tree, ())
    return Fields(by_key)


@dataclass
class Entry:
    """A value of the recipe: the fields that it came from, or what else decided it, and what a reader should know."""

    value: Any
    origins: list[SourceField]
    because: str = ""
    remark: str = ""

    @property
    def comment(self) -> str:
        """Where the value came from, in one line."""
        return ", ".join(dict.fromkeys([origin.shown for origin in self.origins])) or self.because


@dataclass
class Conversion:
    """A recipe in the making, and the report of what it lacks."""

    has_base: bool
    """Whether the recipe extends another, so that what is missing has a value."""
    values: dict[tuple[str, str], Entry] = field(default_factory=dict)
    """Section and field, or "torchtitan" and dotted path."""
    report: dict[tuple[Fate, str], list[SourceField]] = field(default_factory=dict)
    """The fields without counterpart by why, and what is to be said of them."""
    notes: list[str] = field(default_factory=list)
    """What the source means by saying nothing, where the recipe means something else."""
    _settled: set[SourceField] = field(default_factory=set)

    def put(self, word: str, value: Any, *origins: SourceField | None, because: str = "", remark: str = "") -> bool:
        """Set `section.field` of the recipe. A value that the field cannot have, or another than it has got already, is
        reported instead. Returns whether the recipe has the value now."""
        section, _, name = word.partition(".")
        given = [origin for origin in origins if origin is not None]
        value, problem = _fitted(section, name, value)
        there = self.values.get((section, name))
        if problem:
            self.lost(problem, *given)
            return False
        if there and there.value != value:
            self.lost(f"it contradicts {there.comment}, which the recipe follows", *given)
            return False
        entry = there or self.values.setdefault((section, name), Entry(value, [], because, remark))
        entry.origins += given
        self._settled.update(given)
        return True

    def put_torchtitan(self, path: str, value: Any, origin: SourceField) -> None:
        """Set a path of torchtitan's configuration, which the caller has checked."""
        self.values[("torchtitan", path)] = Entry(value, [origin])
        self._settled.add(origin)

    def get(self, word: str) -> Any:
        """What the recipe has so far for `section.field`; None if nothing."""
        section, _, name = word.partition(".")
        entry = self.values.get((section, name))
        return entry.value if entry else None

    def lost(self, reason: str, *fields: SourceField | None) -> None:
        """These fields do something that the recipe does not; `reason` says why, or what to do."""
        self._tell(Fate.LOST, reason, fields)

    def not_needed(self, reason: str, *fields: SourceField | None) -> None:
        """These fields have no counterpart, and none is missed."""
        self._tell(Fate.NOT_NEEDED, reason, fields)

    def lost_if(self, condition: object, reason: str, *fields: SourceField | None) -> None:
        """`lost` if the condition holds, else `not_needed`."""
        self._tell(Fate.LOST if condition else Fate.NOT_NEEDED, reason, fields)

    def given(self, found: SourceField | None) -> SourceField | None:
        """The field, if it has a value of its own; "auto" and null are reported."""
        if found is None or found.value not in (AUTO, None):
            return found
        if found not in self._settled:
            self._tell(*((Fate.AUTO, "") if found.value == AUTO else (Fate.NOT_NEEDED, "empty")), (found,))
        return None

    def is_settled(self, found: SourceField) -> bool:
        """Whether the field is in the recipe or in the report."""
        return found in self._settled

    def finish(self, fields: Iterable[SourceField]) -> None:
        """Report every field that is not settled."""
        for left in fields:
            if left not in self._settled and self.given(left) is not None:
                self._tell(Fate.UNKNOWN, "", (left,))

    def _tell(self, fate: Fate, reason: str, fields: Iterable[SourceField | None]) -> None:
        told = [found for found in fields if found is not None]
        if told:
            self.report.setdefault((fate, reason), []).extend(told)
        self._settled.update(told)


def replicate(conversion: Conversion, data_parallel: int | None, *origins: SourceField | None) -> None:
    """Whole copies of the model on all data-parallel ranks (DDP), whose number is `data_parallel` if it is known."""
    if data_parallel is None:
        reason = (
            "whole copies of the model on every rank (DDP): set [parallelism] data_parallel_replicate to the number of "
            "data-parallel ranks; left out, torchtitan shards (FSDP)"
        )
        conversion.lost(reason, *origins)
        return
    remark = "DDP: the number of all data-parallel ranks; to be changed together with the nodes"
    conversion.put("parallelism.data_parallel_replicate", data_parallel, *origins, remark=remark)


def mixed_precision(conversion: Conversion, precision: str, *origins: SourceField | None) -> None:
    """The precision of the computation: bf16, fp16, fp32."""
    if precision != "fp16":
        conversion.put("training.mixed_precision", precision, *origins)
        return
    remark = "torchtitan has no fp16"
    conversion.put("training.mixed_precision", "bf16", *origins, remark=remark)
    conversion.lost("torchtitan computes in bf16 or fp32, not in fp16; bf16 needs no loss scale", *origins)


def clip_gradients(conversion: Conversion, found: SourceField | None) -> None:
    """Clipping of gradients to a norm, for which 0 means none."""
    norm = conversion.given(found)
    if norm is not None:
        none = norm.value in (0, "0")
        remark = "0 switches clipping off; so does a norm that no gradient reaches" if none else ""
        conversion.put("training.max_grad_norm", 1e9 if none else norm.value, norm, remark=remark)


def whole(value: Any) -> int | None:
    """The value as a whole number, also where it is text or a float with nothing behind the point."""
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def truth(value: Any) -> bool | None:
    """The value as a flag, also where it is text: configurations have all of true, "true", "yes" and "no"."""
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(str(value).lower())


def printable(text: str) -> str:
    """The text without what may not stand in a comment or would change a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _quoted(name: str) -> str:
    is_plain = name and all(char.isalnum() or char in "_-" for char in name)
    return name if is_plain else printable(json.dumps(name, ensure_ascii=False))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _fitted(section: str, name: str, value: Any) -> tuple[Any, str]:
    """The value as the recipe's field takes it (500.0 is a whole number, and "1e-5", as YAML reads 1e-5, a number) and
    what is wrong if it takes it in no form."""
    problem = ""
    for form in (value, whole(value), _number(value)):
        if form is None:
            continue
        _, problems = check_sections(sections(), {(section, name): (form, "")})
        if not problems:
            return form, ""
        problem = problem or problems[0].what
    return value, problem or f"{section}.{name} is left as it is: there is no value"
