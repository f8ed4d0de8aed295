"""Plan a run from a recipe, make its directory, and submit its job; or many runs as one job array.

\b
Examples:
  titan-slurm submit recipes/llama3_debug.toml --cluster local --follow
  titan-slurm submit recipes/llama3_8b.toml --nodes 2 --set slurm.partition=gpu
  titan-slurm submit recipes/llama3_8b.toml --nodes 2 --cluster hpc
  titan-slurm submit recipes/llama3_8b.toml --dry-run
  titan-slurm submit recipes/llama3_debug.toml --name mine --resume --set training.max_steps=120
  titan-slurm submit llama3_8b --name lr --array --set training.learning_rate=1e-4,3e-4,1e-3 --array-limit 2
  titan-slurm submit llama3_8b --name second --after first
  titan-slurm submit llama3_8b --chain 3
  titan-slurm submit llama3_debug --script tools/examples/train_with_accelerator.py --nodes 2 -- --model gemma
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.launch.after import Wait
    from titan_slurm.launch.submit import Prepared
    from titan_slurm.launch.sweep import Sweep

NAME = "submit"

_RUNS_SHOWN = 20

_Names = list[str] | None


class Parser(TyperCommand):
    """Takes only what stands before `--` for the recipe: what stands after it is the script's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Set the parameters in `ctx` by the words of a command line. Returns those that are left."""
        ours, after = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
        left = super().parse_args(ctx, ours)
        ctx.params["arguments"] = [*(ctx.params["arguments"] or ()), *after]
        return left


def command(
    recipe: options.Recipe = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="Of the --script.", show_default=False)
    ] = None,
    nodes: options.Nodes = None,
    cluster: options.Cluster = None,
    settings: options.Set = None,
    name: options.Name = None,
    script: Annotated[
        Path | None,
        typer.Option(help="A script of yours that trains with titan_slurm.accelerate.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of that --name.")] = False,
    array: Annotated[
        bool,
        typer.Option("--array", help="A run for each combination of the values in --set KEY=A,B,…, as a job array."),
    ] = False,
    array_file: Annotated[
        Path | None,
        typer.Option(help="The same, for each line of this file: settings as after --set.", show_default=False),
    ] = None,
    array_limit: Annotated[
        int | None, typer.Option(help="How many runs of the array may run at a time.", min=1, show_default=False)
    ] = None,
    after: Annotated[
        _Names, typer.Option(metavar="RUN", help="Start when that run has completed.", show_default=False)
    ] = None,
    after_any: Annotated[
        _Names, typer.Option(metavar="RUN", help="Start when that run has ended, however.", show_default=False)
    ] = None,
    chain: Annotated[
        int,
        typer.Option(help="So many jobs one after another, where a job cannot be requeued.", min=1, show_default=False),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the script; make nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the run ends.")] = False,
    runs_dir: options.RunsDir = None,
) -> None:
    from titan_slurm.cli import cost, show
    from titan_slurm.errors import bad_input
    from titan_slurm.launch.after import depending
    from titan_slurm.launch.submit import submit, would_start

    wait = _wait(after, after_any, runs_dir)
    if array or array_file:
        _refuse_with_array(resume, follow, chain, script)
        return _submit_array(
            _plan_array(recipe, nodes, settings, cluster, name, runs_dir, array_file, array_limit, wait, dry_run),
            dry_run,
        )
    if array_limit:
        raise bad_input("--array-limit", "has no meaning without --array")

    prepared = options.prepare(
        recipe,
        nodes,
        settings,
        cluster,
        name,
        runs_dir,
        resume=resume,
        only_show=dry_run,
        script=script,
        arguments=arguments or [],
    )
    prepared = depending(prepared, wait)
    if chain > 1:
        _check_chain(prepared)
    show.prepared_notes(prepared)
    show.note(show.plan_line(prepared.plan))
    if not prepared.plan.script and (misfit := cost.misfit(cost.estimated(prepared.resolved))):
        show.note(misfit)
    # What it would refuse it may still take and let wait, for a node that is down now, say: sbatch decides.
    show.start(would_start(prepared))
    if dry_run:
        show.note(f"dry run: nothing is made; the run would be {prepared.run.path}")
        typer.echo(prepared.script, nl=False)
        return None

    job = submit(prepared, chain)
    run = prepared.run
    show.submitted(run, job, "resumed" if resume else "submitted")
    if follow:
        from titan_slurm.cli.follow import follow_to_the_end

        raise typer.Exit(follow_to_the_end(run))
    return None


def _wait(after: _Names, after_any: _Names, runs_dir: Path | None) -> "Wait":
    from titan_slurm.launch.after import Wait, wait_for
    from titan_slurm.run.find import runs_folder

    if not after and not after_any:
        return Wait("", [])
    return wait_for({"--after": after or [], "--after-any": after_any or []}, runs_folder(runs_dir))


def _check_chain(prepared: "Prepared") -> None:
    from titan_slurm.errors import bad_input
    from titan_slurm.launch.script import sbatch_options

    if prepared.plan.cluster != "slurm":
        raise bad_input("--chain", "only jobs of Slurm's follow each other", "a local run comes back by itself")
    if "hold" in sbatch_options(prepared.plan, prepared.run):
        what = "slurm.sbatch.hold is given, and the first job of a chain is released once all are submitted"
        raise bad_input("--chain", what, "leave one of them out")


def _refuse_with_array(resume: bool, follow: bool, chain: int, script: Path | None) -> None:
    from titan_slurm.errors import BadInputError, Problem

    refused = {
        "--resume": (resume, "go on with one of its runs, by that run's --name"),
        "--follow": (follow, "titan-slurm status, or logs of one of its runs"),
        "--chain": (chain > 1, "one of them at a time"),
        "--script": (script is not None, "one run at a time"),
    }
    problems = [Problem(option, "not with --array", hint) for option, (given, hint) in refused.items() if given]
    if problems:
        raise BadInputError(problems)


def _plan_array(
    recipe: str | None,
    nodes: int | None,
    settings: list[str] | None,
    cluster: str | None,
    name: str | None,
    runs_dir: Path | None,
    file: Path | None,
    at_once: int | None,
    wait: "Wait",
    only_show: bool,
) -> "Sweep":
    import dataclasses

    from titan_slurm.launch import sweep
    from titan_slurm.launch.after import depending
    from titan_slurm.launch.place import choose
    from titan_slurm.recipe.resolve import Override
    from titan_slurm.run.find import runs_folder

    asked = [Override(("slurm", "nodes"), nodes, "--nodes")] if nodes is not None else []
    each = [[*one, *asked] for one in sweep.settings_of_runs(settings or [], file)]
    place, runs = choose(cluster), runs_folder(runs_dir)
    planned = sweep.prepare(recipe, each, place=place, runs=runs, name=name, at_once=at_once, only_show=only_show)
    return dataclasses.replace(planned, runs=[depending(run, wait) for run in planned.runs])


def _submit_array(planned: "Sweep", dry_run: bool) -> None:
    from titan_slurm.cli import cost, show
    from titan_slurm.cluster import slurm
    from titan_slurm.launch import sweep

    show.prepared_notes(planned.runs[0])
    others = [note for note in planned.notes if note not in planned.runs[0].notes]
    misfits = [cost.misfit(cost.estimated(run.resolved)) for run in planned.runs]
    for text in dict.fromkeys([*others, show.plan_line(planned.runs[0].plan), *filter(None, misfits)]):
        show.note(text)
    if dry_run:
        # Only here: Slurm would have to plan all that it is to plan again a moment later.
        show.start(slurm.test_only(planned.script, planned.options) if slurm.is_available() else None)
        show.note(f"dry run: nothing is made; the runs would be {planned.runs[0].run.path} and so on:")
        _show_runs(planned, [""] * len(planned.runs))
        typer.echo(planned.script, nl=False)
        return
    jobs = sweep.submit(planned)
    limit = f", {planned.array.at_once} at a time" if planned.array.at_once else ""
    array_job = jobs[0]["job_id"].partition("_")[0]
    typer.echo(f"submitted {len(jobs)} runs as array job {array_job} on slurm{limit}")
    _show_runs(planned, [f"job {job['job_id']}" for job in jobs])
    place = show.place_argument(planned.folder.parent)
    typer.echo(f"  status  titan-slurm status --name '{planned.array.name}-*'{place}")
    typer.echo(f"  cancel  titan-slurm cancel --name '{planned.array.name}-*'{place}")


def _show_runs(planned: "Sweep", jobs: list[str]) -> None:
    """Which run has what; on standard error where standard output is the script."""
    for task, (run, job) in enumerate(zip(planned.runs, jobs, strict=True)):
        if task == _RUNS_SHOWN:
            typer.echo(f"  … and {len(jobs) - task} more: {planned.folder}/sweep.json", err=not job)
            break
        settings = " ".join(f"{name}={value}" for name, value in planned.varied(task).items())
        typer.echo(f"  {run.run.name}  {job}{'  ' if job else ''}{settings}", err=not job)
