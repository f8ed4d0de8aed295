"""The page: one file, offline, with nothing in it that a run's name or a verdict has put there."""

import html.parser
import json
import re
import time
from pathlib import Path

import pytest

from titan_slurm.report import plots
from titan_slurm.report.html import render
from titan_slurm.report.report import Report, State, build
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import append_json_line, write_json

EVIL = "<script>alert('x')</script>&\"'$x_1$"
# What has an end of its own, in HTML and in its SVG.
VOID = {"meta", "br", "path", "use", "rect", "line", "circle"}


class Page(html.parser.HTMLParser):
    """The tags of a page and what they refer to. Fails for one that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(text: str) -> Page:
    """It needs nothing from anywhere."""
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "form", "base"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    return page


def report_of(run: RunDirectory) -> Report:
    return build(run, State("completed", EVIL, time.time(), active=False))


def test_one_file_that_needs_no_other(interrupted: RunDirectory) -> None:
    text = render([report_of(interrupted)])
    page = check(text)
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert '<meta name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    # A timeline for a desk and for a phone, and six curves: no MFU and no memory on a CPU.
    assert page.tags.count("svg") == page.tags.count("figure") == 8
    for words in ("preempted", "crashed", "hung", "cancelled", "completed", "58–110", "lost and repeated work"):
        assert words in page.text


def test_pictures_take_the_pages_colors(interrupted: RunDirectory) -> None:
    text = render([report_of(interrupted)])
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    light, dark = text.split("@media (prefers-color-scheme: dark)")[:2]
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark.split("}", 1)[0]


def test_what_a_run_says_is_escaped(interrupted: RunDirectory) -> None:
    evil = interrupted.path.with_name(EVIL.replace("/", "_"))
    interrupted.path.rename(evil)
    run = RunDirectory(evil)
    first = run.attempts()[0]
    write_json(first.path / "verdict.json", (first.verdict() or {}) | {"verdict": "<blink>", "reason": EVIL * 20})
    write_json(first.path / "attempt.json", first.facts() | {"nodes": EVIL})
    for reports in ([report_of(run)], [report_of(run), report_of(run)]):
        page = check(render(reports))
        assert "blink" not in page.tags
        assert run.name in page.text


def test_runs_over_one_another(interrupted: RunDirectory) -> None:
    one = report_of(interrupted)
    text = render([one, one])
    page = check(text)
    assert "2 runs" in page.text
    assert "timeline" not in [plot.name for plot in plots.plots([one, one])]
    assert page.tags.count("svg") == 6


def test_a_run_without_a_line(interrupted: RunDirectory) -> None:
    interrupted.metrics_file.unlink()
    interrupted.events_file.unlink()
    check(render([report_of(interrupted)]))
    for path in sorted(interrupted.attempts_folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert "<svg" not in render([build(interrupted, State("created", "", time.time(), active=False))])


def test_numbers_of_a_gpu_have_their_pictures(interrupted: RunDirectory) -> None:
    more = {"mfu": 41.0, "memory_active_gib": 60.0, "memory_reserved_gib": 70.0}
    lines = [json.loads(line) | more for line in interrupted.metrics_file.read_text().splitlines()]
    interrupted.metrics_file.unlink()
    for line in lines:
        append_json_line(interrupted.metrics_file, line)
    append_json_line(interrupted.metrics_file, {"step": 40, "time": 1.0, "attempt": 1, "validation_loss": 5.0})
    report = report_of(interrupted)
    names = [plot.name for plot in plots.plots([report])]
    assert names[0] == "timeline"
    assert {"mfu", "memory"} < set(names)
    page = check(render([report]))
    assert "validation" in page.text
    assert "41.0 %" in page.text
    # The MFU is a factor of goodput.
    assert report.goodput.total == pytest.approx(
        0.41 * (report.goodput.scheduling or 0) * (report.goodput.runtime or 0)
    )


def test_hundreds_of_attempts_do_not_make_a_huge_page(interrupted: RunDirectory) -> None:
    for number in range(6, 500):
        time_ = 1795385300.0 + number * 10
        for offset, event in ((0, "started"), (3, "rank_started"), (5, "imports_done")):
            line = {"time": time_ + offset, "event": event, "by": "rank 0", "attempt": number}
            append_json_line(interrupted.events_file, line)
    text = render([report_of(interrupted)])
    check(text)
    assert len(text) < 1_000_000


def test_pictures_as_files(interrupted: RunDirectory, tmp_path: Path) -> None:
    [timeline, *_] = plots.plots([report_of(interrupted)])
    path = plots.write_png(timeline, tmp_path)
    assert path.name == "timeline.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [each.name for each in tmp_path.iterdir() if each.suffix != "" and each.is_file()] == ["timeline.png"]
