"""`titan-slurm runs`: list, show, rm, archive."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titan_slurm.cli import options, select

if TYPE_CHECKING:
    from titan_slurm.cluster.remove import Seen
    from titan_slurm.run.checkpoints import Checkpoint
    from titan_slurm.run.directory import RunDirectory

app = typer.Typer(
    help="The runs as folders: what there is, all of one, removing and archiving.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_runs(
    name: Annotated[
        str | None, typer.Option("--name", metavar="GLOB", help="Only those whose name matches.", show_default=False)
    ] = None,
    sizes: Annotated[bool, typer.Option("--sizes", help="Also what each takes on disk.")] = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    """All runs, by name, and where they are. Asks no scheduler; `titan-slurm status` does.

    \b
    Examples:
      titan-slurm runs list
      titan-slurm runs list --name 'sweep-*' --sizes
    """
    import json

    from titan_slurm.cli import show
    from titan_slurm.run.find import all_runs, runs_folder

    folder, rows, unreadable = runs_folder(runs_dir), [], {}
    for run in select.matching(all_runs(folder), name):
        try:
            rows.append(_row(run, sizes))
        except (OSError, ValueError) as error:
            unreadable[run.plan_file] = str(error)
    select.note_unreadable(unreadable)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"no runs{' like that' if name else ''} in {folder}")
        return
    shown = [
        row
        | {"submitted": show.moment(row["submitted"]), "step": f"{row['step']}/{row['max_steps']}"}
        | ({"size": show.size(row["bytes"])} if sizes else {})
        for row in rows
    ]
    show.table(["name", "recipe", "submitted", "attempts", "step", *(["size"] if sizes else []), "path"], shown)


@app.command("show")
def show_run(run: options.Run, as_json: options.Json = False, runs_dir: options.RunsDir = None) -> None:
    """All of one run: what it is doing, its plan, jobs, attempts, checkpoints, and what it takes on disk.

    \b
    Examples:
      titan-slurm runs show mine
      titan-slurm runs show mine --json
    """
    import json

    from titan_slurm.cli import show
    from titan_slurm.cli.checkpoints import describe
    from titan_slurm.cluster.state import status
    from titan_slurm.run.checkpoints import list_checkpoints
    from titan_slurm.run.find import find_run, runs_folder

    found = find_run(run, runs_folder(runs_dir))
    now, plan = status(found), found.plan()
    jobs, attempts, disk = found.jobs(), [_attempt(each) for each in found.attempts()], _disk(found)
    checkpoints = [describe(each) for each in list_checkpoints(found.checkpoints_folder)]
    if as_json:
        everything = {"status": now.to_dict(), "plan": plan.to_dict(), "jobs": jobs, "attempts": attempts}
        typer.echo(json.dumps(everything | {"checkpoints": checkpoints, "disk": disk}, indent=2))
        return
    for name, text in (*show.status_lines(now), ("plan", show.plan_line(plan))):
        typer.echo(f"{name:>9}  {text}")
    _section(
        ("JOB", "CLUSTER", "SUBMITTED", "BY"),
        [(job["job_id"], job["cluster"], show.moment(job["time"]), job.get("user")) for job in jobs],
    )
    _section(
        ("ATTEMPT", "STARTED", "ENDED", "JOB", "NODES", "SAVED", "VERDICT", "REASON"),
        [
            (
                each["attempt"],
                *(show.moment(each[when]) for when in ("started", "ended")),
                *(each[name] for name in ("job_id", "nodes", "saved_step", "verdict", "reason")),
            )
            for each in attempts
        ],
    )
    _section(
        ("CHECKPOINT", "STATE", "COMMITTED", "SIZE"),
        [
            (
                f"step {each['step']}",
                each["state"],
                show.moment(each["time"]),
                each["bytes"] and show.size(each["bytes"]),
            )
            for each in checkpoints
        ],
    )
    _section(("ON DISK", "SIZE"), [(name, show.size(size)) for name, size in disk.items()])


_Checkpoints = Annotated[
    bool, typer.Option("--checkpoints", help="Also the checkpoints of a run that has them outside its folder.")
]


@app.command("rm")
def remove_runs(
    runs: select.Runs = None,
    everything: select.All = False,
    name: select.Glob = None,
    checkpoints: _Checkpoints = False,
    yes: select.Yes = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    """Remove runs with their checkpoints, after asking; where there is no terminal, --yes has to say that it is meant.
    A run that is queued or running is refused; --all and --name leave such runs alone.

    \b
    Examples:
      titan-slurm runs rm mine
      titan-slurm runs rm --name 'try-*' --yes
    """
    from dataclasses import asdict

    from titan_slurm.cluster.remove import remove

    seen = _at_rest("remove", runs, everything, name, runs_dir)
    if seen:
        select.ask("remove", [_about(each, checkpoints) for each in seen], yes)
    outcomes = [asdict(remove(each, with_checkpoints=checkpoints)) for each in seen]
    select.report(outcomes, "nothing to remove", as_json)


@app.command("archive")
def archive_runs(
    runs: select.Runs = None,
    everything: select.All = False,
    name: select.Glob = None,
    to: Annotated[
        Path, typer.Option("--to", help="Folder, or for a single run a file: .tar.gz, .tgz, .tar.", show_default=False)
    ] = Path(),
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="With the newest checkpoint that is intact, uncompressed.")
    ] = False,
    remove_it: Annotated[bool, typer.Option("--rm", help="Remove the run when its archive is complete.")] = False,
    yes: select.Yes = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    """Put each run into a file of its own, NAME.tar.gz, without its checkpoints. The file is read back and compared
    before it gets its name. Unpacked where it was it is a run again; `sha256sum --check SHA256SUMS` checks it.

    \b
    Examples:
      titan-slurm runs archive mine
      titan-slurm runs archive mine --checkpoint --to /archive
      titan-slurm runs archive --name 'sweep-*' --to /archive --rm
    """
    from dataclasses import asdict

    from titan_slurm.cluster.remove import archive, remove

    seen = _at_rest("archive", runs, everything, name, runs_dir)
    targets = [_target(each.run, to, checkpoint, alone=len(seen) == 1) for each in seen]
    newest = [_newest(each.run) if checkpoint else None for each in seen]
    if seen and (remove_it or not runs):
        verb = "archive and remove" if remove_it else "archive"
        select.ask(verb, [_about(each, with_checkpoints=False) for each in seen], yes)
    outcomes: list[dict[str, Any]] = []
    for each, target, one in zip(seen, targets, newest, strict=True):
        done = asdict(archive(each, target, one)) | {"archive": str(target)}
        if remove_it and not done["error"]:
            gone = remove(each, with_checkpoints=False)
            done |= {"text": f"{done['text']}\n{gone.text}", "error": gone.error}
        outcomes.append(done)
    select.report(outcomes, "nothing to archive", as_json)


def _at_rest(
    verb: str, names: list[str] | None, everything: bool, glob: str | None, runs_dir: Path | None
) -> "list[Seen]":
    """The runs that are meant, of which none is in the scheduler's hands."""
    from titan_slurm.cluster.remove import see
    from titan_slurm.cluster.state import ACTIVE, STATES

    # What is to be asked depends on more than their names.
    states = [state for state in STATES if state not in ACTIVE]
    return see(select.choose(verb, states, names, everything, glob, True, runs_dir))


def _about(seen: "Seen", with_checkpoints: bool) -> str:
    """What would be removed, in a line."""
    from titan_slurm.cli import show
    from titan_slurm.run import checkpoints
    from titan_slurm.run.remove import checkpoints_elsewhere, disk_usage

    run, elsewhere = seen.run, checkpoints_elsewhere(seen.run)
    count = len(checkpoints.committed(run.checkpoints_folder)) if with_checkpoints or not elsewhere else 0
    size = disk_usage(run.path) + (disk_usage(elsewhere) if elsewhere and with_checkpoints else 0)
    about = f"{count} checkpoint{'' if count == 1 else 's'}, {show.size(size)}"
    return f"{run.name}  {seen.now.state}, step {seen.now.step} of {seen.now.max_steps}, {about}"


def _target(run: "RunDirectory", to: Path, checkpoint: bool, *, alone: bool) -> Path:
    from titan_slurm.errors import bad_input
    from titan_slurm.run.archive import ENDINGS

    if to.is_dir():
        # Checkpoints are numbers that no packer makes smaller.
        return to.absolute() / f"{run.name}.tar{'' if checkpoint else '.gz'}"
    if not alone:
        raise bad_input("--to", f"there is no folder {to}", "each run gets a file of its own")
    if not to.name.endswith(ENDINGS):
        raise bad_input("--to", f"{to} is neither a folder that exists nor ends in {', '.join(ENDINGS)}")
    if not to.absolute().parent.is_dir():
        raise bad_input("--to", f"there is no folder {to.parent}")
    return to.absolute()


def _newest(run: "RunDirectory") -> "Checkpoint":
    from titan_slurm.errors import bad_input
    from titan_slurm.run import checkpoints

    for each in checkpoints.committed(run.checkpoints_folder):
        if checkpoints.is_good(each):
            return each
    raise bad_input("--checkpoint", f"run {run.name} has no checkpoint that is intact")


def _row(run: "RunDirectory", sizes: bool) -> dict[str, Any]:
    plan, jobs = run.plan(), run.jobs()
    return {
        "name": run.name,
        "recipe": plan.recipe,
        "cluster": plan.cluster,
        "submitted": jobs[-1]["time"] if jobs else None,
        "attempts": len(run.attempts()),
        "step": run.last_step().get("step", 0),
        "max_steps": plan.max_steps,
        "path": str(run.path),
    } | ({"bytes": sum(_disk(run).values())} if sizes else {})


def _attempt(attempt: Any) -> dict[str, Any]:
    facts, verdict = attempt.facts(), attempt.verdict() or {}
    return {
        "attempt": attempt.number,
        "started": facts.get("started"),
        "ended": verdict.get("time"),
        "job_id": facts.get("job_id"),
        "nodes": facts.get("nodes"),
        "saved_step": verdict.get("saved_step"),
        "verdict": verdict.get("verdict"),
        "reason": "; ".join(text for text in (verdict.get("reason"), verdict.get("why")) if text),
    }


def _disk(run: "RunDirectory") -> dict[str, int]:
    """What a run takes, in bytes, by its folders; the largest first."""
    from titan_slurm.run.remove import checkpoints_elsewhere, disk_usage

    found = {each.name: disk_usage(each) for each in run.path.iterdir() if each.is_dir() and not each.is_symlink()}
    found["files"] = sum(each.stat().st_size for each in run.path.iterdir() if each.is_file())
    if elsewhere := checkpoints_elsewhere(run):
        found[str(elsewhere)] = disk_usage(elsewhere)
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _section(headings: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    from titan_slurm.cli import show

    if rows:
        typer.echo("")
        show.console().print(show.make_table(headings, rows, wrap=["REASON"]))
