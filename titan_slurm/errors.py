"""What a user did wrong, as data: collected first, shown together, never as a traceback."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands, what is wrong, and what would be right (`hint` may be empty)."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.hint})" if self.hint else text


class BadInputError(Exception):
    """Input that cannot be used. The command line shows each problem on a line and leaves with exit code 2."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def bad_input(where: str, what: str, hint: str = "") -> BadInputError:
    """A BadInputError with a single problem."""
    return BadInputError([Problem(where, what, hint)])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """«did you mean …» for the nearest of `known`, or a list of all if they are few, or nothing."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known and len(known) <= 20 else ""
