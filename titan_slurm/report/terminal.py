"""A report in short, for a terminal."""

import math
from collections.abc import Sequence

import plotille
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from titan_slurm.report import text
from titan_slurm.report.compare import table
from titan_slurm.report.hours import HANG, IDLE, LOST, QUEUE, SAVING, SHUT_DOWN, START_UP, TRAINING, VALIDATION
from titan_slurm.report.report import START_UP as START_UP_STEPS
from titan_slurm.report.report import Report
from titan_slurm.report.series import thinned

_STYLES = {
    TRAINING: "blue",
    VALIDATION: "bright_blue",
    SAVING: "cyan",
    START_UP: "yellow",
    LOST: "red",
    HANG: "magenta",
    SHUT_DOWN: "bright_black",
    QUEUE: "white",
    IDLE: "bright_black",
}
_COLORS = ("bright_blue", "bright_red", "bright_green", "bright_magenta", "bright_yellow", "bright_cyan")
_BAR = 36
_PLOT_HEIGHT = 12
# Of a plot whose values are all the same.
_LEAST_HEIGHT = 1e-9
_DIGITS = 4
# Attempts of which a terminal shows every one; of more, the newest.
_MOST_ATTEMPTS = 20
_LONGEST_REASON = 90


def show(reports: Sequence[Report], console: Console) -> None:
    """One run's report, or the table of several."""
    if len(reports) == 1:
        _one(reports[0], console)
    else:
        _beside(reports, console)
    if console.is_terminal:
        _plot(reports, console)


def _one(report: Report, console: Console) -> None:
    lines = {
        "run": report.name,
        "state": report.state + (f" ({report.reason})" if report.reason else ""),
        "steps": f"{report.step:,} of {report.max_steps:,}, {text.short(report.tokens)} tokens",
        "loss": text.number(report.loss, 5),
        "speed": f"{text.short(report.tokens_per_second)} tokens/s",
        "wall time": text.duration(report.wall_seconds),
        "GPU-hours": text.number(report.gpu_hours, 1),
        "goodput": _goodput(report),
        "slowest": _slowest(report),
    }
    for name, value in lines.items():
        if not value.startswith(text.NOTHING):
            console.print(f"[dim]{name:>9}[/]  {escape(value)}", soft_wrap=True)
    console.print()
    _parts(report, console)
    if report.attempts:
        console.print()
        _attempts(report, console)
        console.print()
        _start_up(report, console)


def _goodput(report: Report) -> str:
    parts = report.goodput
    shown = [f"scheduling {text.percent(parts.scheduling)}", f"runtime {text.percent(parts.runtime)}"]
    if parts.program is not None:
        shown.append(f"program {text.percent(parts.program)}")
    return f"{text.percent(parts.total)} = {' × '.join(shown)}"


def _slowest(report: Report) -> str:
    if report.slowest is None:
        return text.NOTHING
    who = report.slowest["host"] or f"rank {report.slowest['rank']}"
    return f"{who} in {text.percent(report.slowest['share'])} of the logged steps (time of the optimizer)"


def _parts(report: Report, console: Console) -> None:
    shown = _table(("", False), ("TIME", True), ("SHARE", True), ("", False))
    longest = max((part.share for part in report.parts), default=0.0) or 1.0
    for part in report.parts:
        if part.seconds:
            bar = "█" * max(1, round(_BAR * part.share / longest))
            style = _STYLES[part.name]
            shown.add_row(
                text.words(part.name), text.duration(part.seconds), text.percent(part.share), f"[{style}]{bar}[/]"
            )
    shown.add_row("wall time", text.duration(report.wall_seconds), "", "", style="bold")
    console.print(shown)


def _attempts(report: Report, console: Console) -> None:
    shown = _table(("#", True), ("VERDICT", False), ("NODES", False), ("STARTED", False), ("TIME", True))
    for heading in ("STEPS", "LOST"):
        shown.add_column(heading, justify="right", no_wrap=True)
    # It alone gives way on a narrow terminal.
    shown.add_column("WHY", overflow="ellipsis", no_wrap=True, ratio=1)
    shown.expand = console.is_terminal
    for row in report.attempts[-_MOST_ATTEMPTS:]:
        shown.add_row(
            str(row.number),
            row.verdict or ("running" if row.end is None else text.NOTHING),
            escape(row.nodes),
            text.when(row.begin),
            text.duration(row.seconds),
            text.steps(row.first_step, row.last_step),
            f"{row.steps_lost:,}",
            escape(_shortened(row.reason)),
        )
    console.print(shown)
    if len(report.attempts) > _MOST_ATTEMPTS:
        console.print(f"[dim]and {len(report.attempts) - _MOST_ATTEMPTS:,} before[/]")


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 2] + " …"


def _start_up(report: Report, console: Console) -> None:
    shown = _table(("#", True), *((text.words(name).upper(), True) for name in START_UP_STEPS), ("START-UP", True))
    for row in report.attempts[-_MOST_ATTEMPTS:]:
        if row.start_up:
            seconds = [text.duration(row.start_up.get(name)) for name in START_UP_STEPS]
            shown.add_row(str(row.number), *seconds, text.duration(sum(row.start_up.values())))
    console.print(shown)


def _beside(reports: Sequence[Report], console: Console) -> None:
    shown = _table(("", False), *((escape(report.name), True) for report in reports))
    for name, values in table(reports):
        shown.add_row(name, *map(escape, values))
    console.print(shown)


def _table(*columns: tuple[str, bool]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="dim")
    for heading, is_number in columns:
        made.add_column(heading, justify="right" if is_number else "left", no_wrap=True)
    return made


def _plot(reports: Sequence[Report], console: Console) -> None:
    """The loss of each run."""
    curves = []
    for report in reports:
        steps, losses = thinned(*report.series.values("loss", report.curve))
        pairs = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
        if len(pairs) > 1:
            curves.append((report.name, pairs))
    if not curves:
        return
    every = [pair for _, pairs in curves for pair in pairs]
    figure = plotille.Figure()
    figure.width, figure.height, figure.origin = max(30, min(100, console.width - 24)), _PLOT_HEIGHT, False
    figure.color_mode, figure.with_colors = "names", not console.no_color
    figure.set_x_limits(min_=min(step for step, _ in every), max_=max(step for step, _ in every))
    figure.set_y_limits(min_=min(loss for _, loss in every), max_=max(loss for _, loss in every) + _LEAST_HEIGHT)
    figure.x_label, figure.y_label = "step", "loss"
    figure.x_ticks_fkt, figure.y_ticks_fkt = (lambda low, _: f"{low:.0f}"), (lambda low, _: f"{low:.{_DIGITS}g}")
    for number, (name, pairs) in enumerate(curves):
        xs, ys = zip(*pairs, strict=True)
        figure.plot(xs, ys, lc=_COLORS[number % len(_COLORS)], label=name if len(reports) > 1 else None)
    console.print()
    # Not every font has the empty one of braille's characters as wide as a space.
    console.print(Text.from_ansi(figure.show(legend=len(reports) > 1).replace("\u2800", " ")))
