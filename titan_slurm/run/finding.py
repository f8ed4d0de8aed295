"""One thing that was looked at on a site, and what to do if it is not right."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

OK, WARN, FAIL = "ok", "warn", "FAIL"
# More names than a line can hold help nobody.
_NAMED_NODES = 16


@dataclass(frozen=True)
class Finding:
    """What was seen, under the name of what was looked at. `advice` says what to do, and is empty if all is right."""

    name: str
    what: str
    advice: str = ""
    is_warning: bool = False
    """A run can do without it."""
    nodes: tuple[str, ...] = ()
    """Where it was seen; empty for what is no matter of a node."""

    @property
    def level(self) -> str:
        """OK, WARN or FAIL."""
        return OK if not self.advice else WARN if self.is_warning else FAIL

    def __str__(self) -> str:
        more = len(self.nodes) - _NAMED_NODES
        where = ",".join(self.nodes[:_NAMED_NODES]) + (f" and {more} more" if more > 0 else "")
        text = f"{self.level:<4} {where}{' ' if where else ''}{self.name}: {self.what}"
        return f"{text} — {self.advice}" if self.advice else text

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is its inverse."""
        return {
            "name": self.name,
            "level": self.level,
            "what": self.what,
            "advice": self.advice,
            "nodes": list(self.nodes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Finding":
        """Read one back. Raises KeyError for what is none."""
        is_warning = values["level"] == WARN
        return cls(values["name"], values["what"], values["advice"], is_warning, tuple(values["nodes"]))


def together(findings: Iterable[Finding]) -> list[Finding]:
    """The same findings with those that differ in their nodes alone put into one."""
    found: dict[Finding, list[str]] = {}
    for each in findings:
        found.setdefault(replace(each, nodes=()), []).extend(each.nodes)
    return [replace(each, nodes=tuple(dict.fromkeys(nodes))) for each, nodes in found.items()]
