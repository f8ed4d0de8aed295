"""Several runs side by side: the same figures of each."""

from collections.abc import Sequence

from titan_slurm.report import text
from titan_slurm.report.report import Report


def table(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    """Rows of a table: what it is, and what each run has. A row that no run has is left out."""
    rows = [_row(report) for report in reports]
    found = [(name, [row[name] for row in rows]) for name in rows[0]]
    return [(name, values) for name, values in found if any(value != text.NOTHING for value in values)]


def _row(report: Report) -> dict[str, str]:
    parts = {part.name: part.seconds for part in report.parts}
    return {
        "state": report.state,
        "recipe": report.recipe,
        "ranks": f"{report.ranks} {report.device}",
        "steps": f"{report.step:,} of {report.max_steps:,}",
        "tokens": text.short(report.tokens),
        "loss": text.number(report.loss, 4),
        "validation loss": text.number(report.validation_loss, 4),
        "tokens per second": text.short(report.tokens_per_second),
        "seconds per step": text.number(report.step_seconds, 3),
        "MFU": text.percent(None if report.mfu is None else report.mfu / 100),
        "memory reserved, GiB": text.number(report.memory_reserved_gib, 1),
        "wall time": text.duration(report.wall_seconds),
        "GPU-hours": text.number(report.gpu_hours, 1),
        "attempts": str(len(report.attempts)),
        "steps lost": f"{report.steps_lost:,}",
        "goodput": text.percent(report.goodput.total),
        "scheduling": text.percent(report.goodput.scheduling),
        "runtime": text.percent(report.goodput.runtime),
        "program": text.percent(report.goodput.program),
        **{f"time: {text.words(name)}": text.duration(seconds or None) for name, seconds in parts.items()},
    }
