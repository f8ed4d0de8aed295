"""The pictures of a report, by matplotlib: as SVG that takes its colours from the page, or as PNG files. Imported only
where pictures are asked for."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from titan_slurm.report import hours
from titan_slurm.report.report import Report
from titan_slurm.report.series import smoothed, thinned
from titan_slurm.report.text import words

# Inches. At this width text is readable on a phone, and where two pictures stand beside one another.
_WIDTH, _HEIGHT = 4.8, 2.45
NARROW, WIDE = 4.3, 9.6
_DPI = 160
# Curves of more points than these are shown with their trend.
_NOISY = 160
# Lines that say where an attempt began; of more than these one would see nothing else.
_MOST_MARKS = 40
_DAY, _HOUR, _MINUTE = 86400.0, 3600.0, 60.0

_COLORS = {
    "ink": "#1c2430",
    "muted": "#667080",
    "grid": "#e3e6ea",
    "paper": "#ffffff",
    "series-1": "#2b62c4",
    "series-2": "#c4572b",
    "series-3": "#2e8b6d",
    "series-4": "#8a5bb0",
    "series-5": "#a98a1d",
    "series-6": "#5b7083",
    hours.TRAINING: "#2b62c4",
    hours.VALIDATION: "#7fa4e6",
    hours.SAVING: "#3fa796",
    hours.START_UP: "#e2a72e",
    hours.LOST: "#cc4b4b",
    hours.HANG: "#7c2f63",
    hours.SHUT_DOWN: "#a68a6d",
    hours.QUEUE: "#b4bcc8",
    hours.IDLE: "#dde1e7",
}
# In an SVG each stands for a variable of the page's style sheet.
_IN_PAGE = {name: f"#fe{number:02x}ef" for number, name in enumerate(_COLORS)}
# Names of runs are no formulas.
_RC: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "titan-slurm",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "figure.titlesize": 9.5,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.3,
    "lines.solid_joinstyle": "round",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Plot:
    """A picture: its name, which is its file's, what it shows, and how to draw it in some colours and some width."""

    name: str
    title: str
    draw: Callable[[dict[str, str], float], Figure]


def plots(reports: Sequence[Report]) -> list[Plot]:
    """The pictures for which there are numbers; of several runs over one another, or of one with its timeline."""
    found = []
    if len(reports) == 1 and reports[0].timeline:
        found.append(Plot("timeline", "Timeline of attempts", lambda *how: _timeline(reports[0], *how)))
    for name, title, columns, scale in _CURVES:
        if any(report.series.has(column) for report in reports for column in columns):
            found.append(Plot(name, title, _curves_drawer(reports, name, columns, scale)))
    return found


def as_svg(plot: Plot, width: float = _WIDTH) -> str:
    """An SVG element for an HTML page: its colours are the page's variables, its text takes the page's font."""
    with mpl.rc_context(_RC):
        figure, file = plot.draw(_IN_PAGE, width), io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    for name, color in _IN_PAGE.items():
        text = text.replace(color, f"var(--{name.replace('_', '-')})")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1\.1"| id="[A-Za-z]+[0-9a-z]*_\d+"', "", text)
    # A style sheet of its own would be the whole page's.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    # Of coordinates two digits are a hundredth of a pixel.
    text = re.sub(r'"[^"]*"', lambda attribute: re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0]), text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(
        r'(<svg)( [^>]*?)? width="[^"]*"', r"\1\2", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    )
    label = plot.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def write_png(plot: Plot, folder: Path) -> Path:
    """Write `NAME.png`, atomically. Returns its path."""
    path = folder / f"{plot.name}.png"
    temporary = folder / f".{plot.name}.png.part"
    try:
        with mpl.rc_context(_RC):
            figure = plot.draw(_COLORS, _WIDTH)
            # A page has it as a caption.
            figure.suptitle(plot.title, x=0.01, horizontalalignment="left", color=_COLORS["ink"])
            figure.savefig(temporary, format="png", dpi=_DPI, facecolor=_COLORS["paper"])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


_CURVES = (
    ("loss", "Loss", ("loss",), "linear"),
    ("learning_rate", "Learning rate", ("lr",), "linear"),
    ("grad_norm", "Gradient norm", ("grad_norm",), "log"),
    ("tokens_per_second", "Tokens per second", ("tokens_per_second",), "linear"),
    ("mfu", "MFU, percent of the GPUs' peak", ("mfu",), "linear"),
    ("memory", "Memory per GPU in GiB", ("memory_active_gib", "memory_reserved_gib"), "linear"),
    ("step_time", "Seconds per step", ("step_seconds", "data_seconds"), "linear"),
    ("ranks_apart", "Seconds of the optimizer, fastest to slowest rank", ("optimizer_seconds_max",), "linear"),
)
_LABELS = {
    "loss": "training",
    "memory_active_gib": "in use",
    "memory_reserved_gib": "reserved",
    "step_seconds": "whole step",
    "data_seconds": "waiting for data",
    "optimizer_seconds_max": "slowest rank",
}
_SPREADS = {"step_seconds": "step_seconds", "optimizer_seconds_max": "optimizer_seconds"}


def _curves_drawer(
    reports: Sequence[Report], name: str, columns: Sequence[str], scale: str
) -> Callable[[dict[str, str], float], Figure]:
    def draw(colors: dict[str, str], width: float) -> Figure:
        figure, axes = _figure(colors, width, _HEIGHT)
        for number, report in enumerate(reports):
            for column in columns[: 1 if len(reports) > 1 else None]:
                color = colors[f"series-{(number if len(reports) > 1 else columns.index(column)) % 6 + 1}"]
                label = report.name if len(reports) > 1 else _LABELS.get(column, "")
                _curve(axes, report, column, color, label)
            if name == "loss":
                _validations(axes, report, colors[f"series-{2 if len(reports) == 1 else number % 6 + 1}"], len(reports))
        if len(reports) == 1:
            _mark_attempts(axes, reports[0], colors)
        _scale(axes, reports, columns[0], scale)
        axes.margins(x=0.01)
        axes.set_xlabel("step", color=colors["muted"], loc="right", labelpad=1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens_per_second" else "{x:g}")
        _legend(axes, colors)
        return figure

    return draw


def _rows(report: Report, column: str) -> Sequence[int]:
    # What a first step takes longer is part of the start-up, and would leave no room for the others.
    return report.series.without_first(report.curve) if "_seconds" in column else report.curve


def _curve(axes: Axes, report: Report, column: str, color: str, label: str) -> None:
    xs, ys = report.series.values(column, _rows(report, column))
    if not xs:
        return
    if spread := _SPREADS.get(column):
        _band(axes, report, spread, color)
    noisy = len(xs) > _NOISY and column not in ("lr", "memory_active_gib", "memory_reserved_gib")
    if noisy:
        axes.plot(*thinned(xs, ys), color=color, alpha=0.35, linewidth=0.8)
        axes.plot(*smoothed(xs, ys), color=color, label=label)
    else:
        few: Any = {"marker": "o", "markersize": 2.5} if len(xs) < 3 else {}
        axes.plot(*thinned(xs, ys), color=color, label=label, **few)


def _band(axes: Axes, report: Report, name: str, color: str) -> None:
    """From the fastest rank to the slowest."""
    rows = _rows(report, name)
    low_x, low = report.series.values(f"{name}_min", rows)
    high_x, high = report.series.values(f"{name}_max", rows)
    if low_x and low_x == high_x:
        middle = [(one + other) / 2 for one, other in zip(low, high, strict=True)]
        # The same points of both.
        where, _ = thinned(low_x, middle)
        places = {step: place for place, step in enumerate(low_x)}
        chosen = [places[step] for step in where]
        axes.fill_between(
            where, [low[c] for c in chosen], [high[c] for c in chosen], color=color, alpha=0.3, linewidth=0
        )


def _validations(axes: Axes, report: Report, color: str, runs: int) -> None:
    found = {step: value for step, value in report.series.validations.items() if math.isfinite(value)}
    if found:
        steps = sorted(found)
        label = "validation" if runs == 1 else f"{report.name}, validation"
        xs, ys = thinned(steps, [found[step] for step in steps], 60)
        axes.plot(xs, ys, color=color, label=label, marker="o", markersize=3, linestyle="--", linewidth=0.9)


def _mark_attempts(axes: Axes, report: Report, colors: dict[str, str]) -> None:
    begins = [row.first_step for row in report.attempts[1:] if row.first_step is not None]
    if len(begins) <= _MOST_MARKS:
        for step in begins:
            axes.axvline(step, color=colors["muted"], linewidth=0.7, linestyle=(0, (2, 3)), zorder=0.5)


def _scale(axes: Axes, reports: Sequence[Report], column: str, scale: str) -> None:
    values = [y for report in reports for y in report.series.values(column, report.curve)[1] if y > 0]
    if scale == "log" and values and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif column not in ("loss", "max_loss"):
        axes.set_ylim(bottom=0)


def _timeline(report: Report, colors: dict[str, str], width: float) -> Figure:
    """One row for each attempt, newest at the bottom; what was between them in the row of the next."""
    assert report.begin is not None
    unit, unit_name = _unit(report.wall_seconds)
    numbers = [row.number for row in report.attempts]
    rows = {number: place for place, number in enumerate(numbers)}
    figure, axes = _figure(colors, width, min(9.0, 1.0 + 0.27 * max(1, len(rows))))
    used: dict[str, None] = {}
    place = 0
    # Thousands of saves are not seen apart.
    shortest = report.wall_seconds / 2000
    for part, begin, seconds, attempt in _merged(report, shortest):
        if attempt is not None:
            place = rows[attempt]
        row = place if attempt is not None else min(_next_row(report, begin, rows), max(len(rows) - 1, 0))
        axes.barh(row, seconds / unit, left=begin / unit, height=0.62, color=colors[part], linewidth=0)
        used[part] = None
    axes.set_yticks(range(len(numbers)) if len(numbers) <= 25 else [0, len(numbers) - 1])
    axes.set_yticklabels([f"{number}" for number in (numbers if len(numbers) <= 25 else [numbers[0], numbers[-1]])])
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.set_xlim(0, report.wall_seconds / unit or 1)
    axes.grid(visible=False, axis="y")
    axes.set_ylabel("attempt", color=colors["muted"])
    axes.set_xlabel(f"{unit_name} since the first submission", color=colors["muted"], loc="right", labelpad=1)
    names = [part for part in hours.PARTS if part in used]
    handles = [Patch(facecolor=colors[part], label=words(part)) for part in names]
    _legend(axes, colors, handles=handles, columns=8 if width == WIDE else 3)
    return figure


def _merged(report: Report, shortest: float) -> Iterator[tuple[str, float, float, int | None]]:
    """(part, begin, seconds, attempt) of the timeline; what is too short to be seen goes with what was before it."""
    assert report.begin is not None
    current: tuple[str, float, float, int | None] | None = None
    for each in report.timeline:
        begin = each.begin - report.begin
        if current and current[3] == each.attempt and (each.seconds < shortest or current[0] == each.part):
            current = (current[0], current[1], begin + each.seconds - current[1], current[3])
            continue
        if current:
            yield current
        current = (each.part, begin, each.seconds, each.attempt)
    if current:
        yield current


def _next_row(report: Report, begin: float, rows: dict[int, int]) -> int:
    assert report.begin is not None
    later = [row.number for row in report.attempts if row.begin - report.begin > begin]
    return rows[later[0]] if later else len(rows)


def _unit(seconds: float) -> tuple[float, str]:
    units = ((2 * _DAY, _DAY, "days"), (2 * _HOUR, _HOUR, "hours"), (3 * _MINUTE, _MINUTE, "minutes"))
    return next(((size, name) for least, size, name in units if seconds > least), (1.0, "seconds"))


def _figure(colors: dict[str, str], width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(color=colors["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors["muted"])
    axes.tick_params(colors=colors["muted"], labelcolor=colors["muted"], length=0, which="both")
    axes.tick_params(axis="x", length=3, which="major")
    return figure, axes


def _legend(axes: Axes, colors: dict[str, str], columns: int = 3, **more: Any) -> None:
    handles = more.get("handles") or axes.get_legend_handles_labels()[0]
    if len(handles) > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=columns,
            frameon=False,
            labelcolor=colors["ink"],
            handlelength=1.1,
            columnspacing=1.2,
            borderpad=0,
            borderaxespad=0.3,
            **more,
        )
