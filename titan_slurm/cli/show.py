"""How things look: for people on a terminal, plainly in a pipe."""

import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from titan_slurm.cluster.slurm import Answer
    from titan_slurm.cluster.state import RunStatus
    from titan_slurm.launch.submit import Prepared
    from titan_slurm.run.directory import RunDirectory
    from titan_slurm.run.plan import Plan

_STYLES = {
    "completed": "green",
    "running": "cyan",
    "queued": "yellow",
    "requeued": "yellow",
    "stopping": "yellow",
    "failed": "bold red",
    "cancelled": "magenta",
    "created": "dim",
}


def console(*, stderr: bool = False) -> "Console":
    """A console that neither wraps nor colours in a pipe."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=10_000, no_color=True)


def note(text: str) -> None:
    """One line for people, on standard error: standard output may be read by a program."""
    print(f"note: {text}", file=sys.stderr)


def table(columns: "Sequence[str]", rows: "Sequence[Mapping[str, object]]") -> None:
    """Print rows by their columns' names."""
    headings = [column.upper() for column in columns]
    console().print(make_table(headings, [[row[column] for column in columns] for row in rows]))


def make_table(
    headings: "Sequence[str]",
    rows: "Iterable[Sequence[object]]",
    *,
    right: "Collection[str]" = (),
    wrap: "Collection[str] | None" = None,
) -> "Table":
    """A table in our style. What is None is left empty; rich's own Text keeps its colours. `right`: headings of columns
    to adjust to the right; `wrap`: of those that may take several lines, all but the first if left out."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        may_wrap = number > 0 if wrap is None else heading in wrap
        shown.add_column(heading, justify="right" if heading in right else "left", no_wrap=not may_wrap)
    for row in rows:
        cells = ("" if cell is None else cell for cell in row)
        shown.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))
    return shown


def prepared_notes(prepared: "Prepared") -> None:
    """Where the recipe and the template were found, and what else was decided for the user."""
    note(f"recipe {prepared.resolved.name} {prepared.plan.recipe_version}: {_whose(prepared.resolved.found)}")
    if prepared.template.origin != "built-in":
        note(f"template: {_whose(prepared.template)}")
    for text in prepared.notes:
        note(text)


def start(answer: "Answer | None", *, must_be_accepted: bool = False) -> None:
    """What Slurm said when it was asked when a job would start. Raises BadInputError for a refusal, if that counts."""
    from titan_slurm.errors import bad_input

    if answer is not None and answer.start:
        note(f"would start at {answer.start}, by Slurm's estimate")
    elif answer is not None and must_be_accepted:
        raise bad_input("sbatch --test-only", answer.text)
    elif answer is not None:
        note(f"Slurm cannot say when it would start: {answer.text}")


def plan_line(plan: "Plan") -> str:
    """The layout of a plan in one line."""
    layout = plan.layout
    shards = layout.data_parallel // layout.data_parallel_replicate
    degrees = {
        "FSDP": shards,
        "replicas": layout.data_parallel_replicate,
        "TP": layout.tensor_parallel,
        "PP": layout.pipeline_parallel,
        "CP": layout.context_parallel,
        "EP": layout.expert_parallel,
    }
    shown = " × ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one rank"
    where = "on this machine" if plan.cluster == "local" else f"on {_count(layout.nodes, 'node')}"
    tokens = layout.global_batch_size * plan.torchtitan["training.seq_len"]
    return (
        f"{layout.world_size} {plan.device} ranks {where} ({shown}); {tokens:,} tokens a step "
        f"({_count(layout.global_batch_size, 'sequence')}, "
        f"{_count(layout.gradient_accumulation_steps, 'accumulation step')}), "
        f"{plan.max_steps:,} steps"
    )


def built_line(built: "Mapping[str, Any]") -> str:
    """What torchtitan built of a plan, in one line."""
    ranks = " and ".join(map(str, built["ranks"]))
    return (
        f"torchtitan builds it: {built['parameters']:,} parameters, {built['rank_parameters']:,} on a rank at most "
        f"(looked at: {ranks}), in {built['seconds']} s"
    )


def status_lines(status: "RunStatus") -> list[tuple[str, str]]:
    """A run's status, field by field."""
    progress = f"{status.step} of {status.max_steps}"
    if status.seconds_left is not None:
        progress += f", {duration(status.seconds_left)} left"
    lines = [
        ("run", status.name),
        ("state", status.state + (f" ({status.reason})" if status.reason else "")),
        ("step", progress),
    ]
    if status.loss is not None:
        lines.append(("loss", f"{status.loss:.5f}"))
    if status.tokens_per_second is not None:
        lines.append(("speed", f"{status.tokens_per_second:,.0f} tokens/s"))
    lines += [
        ("recipe", status.recipe),
        ("job", f"{status.job_id or '-'} on {status.cluster}" + (f" ({status.nodes})" if status.nodes else "")),
        ("attempts", str(status.attempts)),
        *([("excluded", ", ".join(status.excluded_nodes))] if status.excluded_nodes else []),
        ("path", status.path),
    ]
    return lines


def submitted(run: "RunDirectory", job: dict[str, Any], verb: str) -> None:
    """What was submitted, and the commands to go on with."""
    chain = job.get("chain", [])
    jobs = f"jobs {', '.join(chain)}, one after another," if chain else f"job {job['job_id']}"
    print(f"{verb} run {run.name} as {jobs} on {job['cluster']}")
    print(f"  path    {run.path}")
    print(f"  status  titan-slurm status {arguments(run)}")
    print(f"  log     titan-slurm logs {arguments(run)} -f")
    print(f"  cancel  titan-slurm cancel {arguments(run)}")


def arguments(run: "RunDirectory") -> str:
    """How a run is named on the command line: by its name where that is enough. Ready for the shell."""
    from titan_slurm.run.find import runs_folder

    return run.name if run.path.parent == runs_folder(None) else shlex.quote(str(run.path))


def place_argument(folder: "Path") -> str:
    """How a folder of runs is named on the command line, after a space; empty for the one that is meant anyway."""
    from titan_slurm.run.find import runs_folder

    return "" if folder == runs_folder(None) else f" --runs-dir {shlex.quote(str(folder))}"


def next_command(run: "RunDirectory", status: "RunStatus") -> str:
    """What a user most likely wants to do with a run that has ended."""
    if status.state == "failed":
        return f"titan-slurm logs {arguments(run)}"
    if status.state != "completed":
        return f"titan-slurm resume {arguments(run)}"
    recipe, place = shlex.quote(str(run.recipe_file)), place_argument(run.path.parent)
    more = f"--set training.max_steps={2 * status.max_steps}"
    return f"titan-slurm submit {recipe}{place} --name {run.name} --resume {more}"


def styled_state(state: str) -> "Text":
    """The state in its colour."""
    from rich.text import Text

    return Text(state, _STYLES[state])


def moment(seconds: float | None) -> str:
    """A time in seconds since 1970, here: 2026-11-22 21:50:00."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def duration(seconds: float) -> str:
    """1d 02:03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours:02}:{minutes:02}:{seconds:02}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _whose(found: object) -> str:
    from titan_slurm.recipe.find import Found

    assert isinstance(found, Found)
    whose = {"built-in": "built-in, ", "site": "the site's, ", "user": "your own, ", "path": ""}
    return whose[found.origin] + str(found.path)
