"""A report as one HTML file, which needs nothing else: no script, no font, no picture from anywhere."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

import titan_slurm
from titan_slurm.report import plots, text
from titan_slurm.report.compare import table
from titan_slurm.report.hours import PARTS
from titan_slurm.report.report import START_UP, Report

_TEMPLATE = "report.html.j2"
# Attempts of which a page shows every one; of more, the newest.
_MOST_ATTEMPTS = 200
# The timeline for a desk and for a phone; the page shows the one that fits.
_WIDTHS = (plots.WIDE, plots.NARROW)


def render(reports: Sequence[Report]) -> str:
    """The page of a run, or of several beside one another."""
    source = resources.files("titan_slurm.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: getattr(text, name) for name in ("duration", "percent", "number", "short", "when")}
    environment.filters["words"] = text.words
    drawn = plots.plots(reports)
    timelines = [plots.as_svg(plot, width) for plot in drawn if plot.name == "timeline" for width in _WIDTHS]
    known: dict[str, Any] = {
        "reports": reports,
        "one": reports[0] if len(reports) == 1 else None,
        "table": table(reports),
        "timelines": timelines,
        "pictures": [(plot.name, plot.title, plots.as_svg(plot)) for plot in drawn if plot.name != "timeline"],
        "start_up": START_UP,
        "part_names": list(PARTS),
        "most": _MOST_ATTEMPTS,
        "steps": text.steps,
        "version": titan_slurm.__version__,
    }
    return environment.from_string(source).render(known)
