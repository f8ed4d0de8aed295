"""The command line: one verb per file, which parses, calls one function and prints. Everything heavy is imported inside
the verbs: `titan-slurm --help` loads typer and nothing else."""

import gc
import os
import sys

import typer

from titan_slurm.cli import (
    cancel,
    checkpoints,
    cluster,
    compare,
    convert,
    doctor,
    ensure,
    logs,
    nodes,
    recipes,
    render,
    report,
    reproduce,
    requeue,
    resume,
    runs,
    status,
    submit,
    templates,
    validate,
    wandb,
)
from titan_slurm.errors import BadInputError

app = typer.Typer(
    name="titan-slurm",
    help="Train LLMs with torchtitan from TOML recipes, on Slurm or on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help starts twice as fast, and leaves the examples in the lines they are written in.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    submit,
    ensure,
    render,
    validate,
    convert,
    status,
    logs,
    cancel,
    resume,
    requeue,
    reproduce,
    compare,
    report,
    doctor,
):
    app.command(verb.NAME, cls=getattr(verb, "Parser", None), help=verb.__doc__)(verb.command)
app.add_typer(recipes.app, name="recipes")
app.add_typer(cluster.app, name="cluster")
app.add_typer(templates.app, name="templates")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(runs.app, name="runs")
app.add_typer(nodes.app, name="nodes")
app.add_typer(wandb.app, name="wandb")


def main() -> None:
    """Run the command line. Bad input ends with exit code 2 and one line per mistake."""
    # What a verb imports stays; to look through it for garbage again and again takes a tenth of the start.
    gc.set_threshold(50_000)
    # Nor does pydantic look for plugins in all that is installed: none has a say in what is valid here.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app()
    except BadInputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except FileNotFoundError:
        # Any verb asks for it, in many places.
        if _has_working_directory():
            raise
        print("error: the working directory is not there any more (cd to one that is)", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read has enough: `titan-slurm logs RUN | head`.
        sys.stderr.close()
        sys.exit(0)


def _has_working_directory() -> bool:
    try:
        os.getcwd()  # noqa: PTH109 (only whether there is one)
    except FileNotFoundError:
        return False
    return True
