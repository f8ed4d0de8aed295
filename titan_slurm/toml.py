"""TOML text as flat values with the line that each stands on, which tomli does not tell. What the values mean does not
live here."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from titan_slurm.errors import bad_input

Key = tuple[str, ...]


@dataclass(frozen=True)
class TomlFile:
    """A parsed file: `tables` as tomli gives it, `lines` with the line (from 1) of each key and table header."""

    path: Path
    tables: dict[str, Any]
    lines: dict[Key, int]

    def where(self, key: Key) -> str:
        """`file:line` of a key, or of the nearest table around it."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines[key]}" if key else str(self.path)


def read(path: Path) -> TomlFile:
    """Parse a file. Raises BadInputError if it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Some editors begin a file with a byte order mark.
    except OSError as error:
        raise bad_input(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise bad_input(str(path), "is not UTF-8 text") from None
    try:
        tables = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise bad_input(f"{path}:{error.lineno}", f"not TOML: {error.msg} (column {error.colno})") from None
    return TomlFile(path, tables, _lines_of_keys(text))


def parse_value(text: str) -> Any:
    """A value as TOML writes it; what is not TOML is taken for a string, so that shells need no extra quotes."""
    try:
        value = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    # A newline in the text could have ended the value and begun another key. 01:00:00 is a time limit, no time of day.
    is_value = list(value) == ["value"] and not isinstance(value["value"], datetime.date | datetime.time)
    return value["value"] if is_value else text


def flatten(tables: dict[str, Any], prefix: Key = ()) -> dict[Key, Any]:
    """Nested tables as one flat dict; a table stays a value only where it is empty."""
    flat: dict[Key, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, (*prefix, name)))
        else:
            flat[(*prefix, name)] = value
    return flat


def _lines_of_keys(text: str) -> dict[Key, int]:
    """The first line of each statement's keys. A statement is the fewest lines that are valid TOML by themselves."""
    lines: dict[Key, int] = {}
    table: Key = ()
    statement: list[str] = []
    # Not splitlines, which knows more line ends than TOML: some of them may stand in a string.
    for number, line in enumerate(text.split("\n"), start=1):
        statement.append(line)
        try:
            parsed = tomli.loads("\n".join(statement))
        except tomli.TOMLDecodeError:
            continue
        first = number - len(statement) + 1
        is_header = line.lstrip().startswith("[") and len(statement) == 1
        if is_header:
            table = _only_path(parsed)
            lines.setdefault(table, first)
        else:
            for key in flatten(parsed):
                for depth in range(1, len(key) + 1):
                    lines.setdefault((*table, *key[:depth]), first)
        statement = []
    return lines


def _only_path(parsed: dict[str, Any]) -> Key:
    """The keys down a chain of tables with one entry each, as the header `[a.b]` parses."""
    path: Key = ()
    value: Any = parsed
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        path = (*path, name)
    return path
