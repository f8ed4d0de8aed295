"""How a report's numbers are written, on a terminal as on a page."""

from datetime import datetime

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
NOTHING = "–"


def duration(seconds: float | None) -> str:
    """Two units at most: 12.3 s, 4 min 05 s, 3 h 07 min, 2 d 04 h."""
    if seconds is None:
        return NOTHING
    if seconds < _MINUTE - 0.05:
        return f"{seconds:.1f} s"
    if round(seconds) < _HOUR:
        return "{} min {:02} s".format(*divmod(round(seconds), _MINUTE))
    if round(seconds / _MINUTE) < _DAY // _MINUTE:
        return "{} h {:02} min".format(*divmod(round(seconds / _MINUTE), _HOUR // _MINUTE))
    return "{} d {:02} h".format(*divmod(round(seconds / _HOUR), _DAY // _HOUR))


def percent(share: float | None) -> str:
    """A part of one."""
    return NOTHING if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 0) -> str:
    """With thousands apart."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """About three digits: 512, 24.6 k, 1.31 M, 2.10 B."""
    if value is None:
        return NOTHING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,.0f}"


def when(time: float | None) -> str:
    """The local date and time of an instant."""
    return NOTHING if time is None else datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")


def words(name: str) -> str:
    """A part or a step of the start-up, as people write it."""
    return {"start_up": "start-up", "shut_down": "shut-down", "lost": "lost and repeated work"}.get(
        name, name.replace("_", " ")
    )


def steps(first: int | None, last: int | None) -> str:
    """From which step to which."""
    return NOTHING if first is None or last is None or last < first else f"{first:,}–{last:,}"
