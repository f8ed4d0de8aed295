"""Turn a config of DeepSpeed, Accelerate or torchtitan 0.2 into a recipe.

Each value of the recipe has the field it came from beside it. Every field without a counterpart is listed with the
reason, on standard error and at the end of the recipe: none is dropped in silence.

\b
Examples:
  titan-slurm convert ds_config.json --extends llama3_8b --to recipes/mine.toml
  titan-slurm convert fsdp.yaml --to mine.toml
  titan-slurm convert train_configs/llama3_8b.toml > mine.toml
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

NAME = "convert"


def command(
    file: Annotated[Path, typer.Argument(help="The config to convert.", show_default=False)],
    to: Annotated[
        Path | None, typer.Option("--to", help="Recipe to write; printed if left out.", show_default=False)
    ] = None,
    extends: Annotated[
        str | None,
        typer.Option("--extends", help="Recipe to extend, for all that the config does not say.", show_default=False),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--from", help="deepspeed, accelerate or torchtitan; seen from the content if left out.", show_default=False
        ),
    ] = None,
) -> None:
    import sys

    from titan_slurm.cli import show
    from titan_slurm.errors import bad_input
    from titan_slurm.recipe.convert.convert import convert

    if to is not None and to.suffix != ".toml":
        raise bad_input(f"--to {to}", "is not the name of a recipe's file", "which ends in .toml")
    if to is not None and (to.exists() or to.is_symlink()):
        raise bad_input(str(to), "exists already")
    converted = convert(file, kind=kind, extends=extends, to=to)
    show.note(f"{file} is {converted.kind}; {converted.values} values of the recipe come from it")
    if to is None:
        typer.echo(converted.text, nl=False)
    else:
        _write(to, converted.text)
        typer.echo(to)
    for line in converted.report:
        print(line, file=sys.stderr)
    if to is not None:
        show.note(f"titan-slurm validate {shlex.quote(str(to))}: says what is missing")


def _write(path: Path, text: str) -> None:
    from titan_slurm.errors import bad_input
    from titan_slurm.run.files import write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise bad_input(str(path), f"cannot be written: {error.strerror}") from None
