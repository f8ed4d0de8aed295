"""Recipe × place → plan. Checks what only this machine can tell: paths, folders, GPUs."""

import importlib.util
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_slurm.errors import BadInputError, Problem, did_you_mean
from titan_slurm.launch import place, tokenizer, user_script, weights
from titan_slurm.recipe import hf_config
from titan_slurm.recipe.conflicts import needing_gpus
from titan_slurm.recipe.data import data_values
from titan_slurm.recipe.mapping import (
    activation_checkpointing,
    float8_values,
    optimizer_values,
    torchtitan_values,
)
from titan_slurm.recipe.model import TRANSFORMERS, ModelSizes, llama_sizes, model_sizes
from titan_slurm.recipe.resolve import ResolvedRecipe, origin
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import TORCHTITANS_LOOP, Plan
from titan_slurm.run.redact import holds_secret, secret_arguments

if TYPE_CHECKING:
    from titan_slurm.cluster.profile import Profile

# 256 bytes and two special tokens.
_SMALLEST_VOCAB_SIZE = 258
_TEXT_FILES = (".jsonl", ".txt", ".parquet")


def make_plan(
    resolved: ResolvedRecipe,
    run: RunDirectory,
    cluster: str,
    profile: "Profile | None" = None,
    *,
    elsewhere: list[Problem] | None = None,
    script: user_script.UserScript | None = None,
    quick: bool = False,
) -> Plan:
    """The plan of a run that is to stand at `run`. Raises BadInputError with everything that cannot work here; where
    `elsewhere` is given, for a script that is only shown, it is added there instead. `script`: what trains in the place
    of torchtitan's loop. `quick`: large files are not read."""
    problems: list[Problem] = user_script.problems_with(script, resolved) if script else []
    recipe, layout = resolved.recipe, resolved.layout
    device = _device(resolved, cluster, problems)
    torchtitan = torchtitan_values(recipe, layout, resolved.torchtitan, device=device)
    torchtitan["checkpoint.folder"] = str(_save_folder(resolved, run, problems))
    torchtitan |= _start_from(resolved, problems)
    data = data_values(recipe)
    # torchtitan streams what is no file here, in its own loop only. A script makes its model itself.
    if data["map_style"] or not script:
        _check_data(resolved, data, None if quick or script else model_sizes(recipe), problems)
    model = {"name": "script"} if script else _model(resolved, problems)
    mounts: list[str] = []
    if profile is not None:
        mounts, unseen = place.mounts(profile, run, [data, model, torchtitan])
        problems += [*place.misfits(resolved, profile, run), *unseen]
    values = {".".join(key): {"value": each.value, "from": each.origin} for key, each in resolved.values.items()}
    values |= place.frozen_values(profile) if profile else {}
    problems += _secrets_in(values, script.arguments if script else ())
    if elsewhere is not None:
        elsewhere += problems
    elif problems:
        raise BadInputError(problems)
    return Plan(
        name=run.name,
        run_id=f"{run.name[:40]}-{secrets.token_hex(4)}",
        recipe=resolved.name,
        recipe_version=recipe.recipe.version,
        cluster=cluster,
        device=device,
        layout=layout,
        model=model,
        data=data,
        optimizer=optimizer_values(recipe),
        activation_checkpointing=activation_checkpointing(recipe),
        wandb=recipe.wandb.model_dump(),
        torchtitan=torchtitan,
        slurm=recipe.slurm.model_dump(),
        requeue=recipe.requeue.model_dump(),
        values=values,
        profile=place.frozen(profile, mounts) if profile else None,
        float8=float8_values(recipe),
        export_to_hf=recipe.checkpointing.export_to_hf,
        life=user_script.LIFE if script else TORCHTITANS_LOOP,
        script=script.planned(run.path.parent) if script else None,
    )


def _model(resolved: ResolvedRecipe, problems: list[Problem]) -> dict[str, Any]:
    model = resolved.recipe.model
    if model.name == TRANSFORMERS:
        return {"name": model.name, "config": _transformers_config(resolved, problems)}
    if model.flavor:
        return {"name": model.name, "flavor": model.flavor}
    return {"name": model.name, "sizes": llama_sizes(resolved.recipe)}


def _transformers_config(resolved: ResolvedRecipe, problems: list[Problem]) -> dict[str, Any]:
    if importlib.util.find_spec("transformers") is None:
        what, hint = "the package transformers is not installed", "pip install 'titan-slurm[transformers]'"
        problems.append(_problem(resolved, "model", "name", what, hint))
    try:
        return hf_config.load(resolved.recipe.model.config or {})
    except hf_config.ConfigError as error:
        problems.append(_problem(resolved, "model", error.field, error.what, error.hint))
        return {}


def _check_data(
    resolved: ResolvedRecipe, data: Mapping[str, Any], sizes: ModelSizes | None, problems: list[Problem]
) -> None:
    """`sizes`: of the model whose vocabulary the tokenizer is to keep to."""
    vocab_size = data["tokenizer_vocab_size"]
    if data["tokenizer"] != "python_docs":
        for what, hint in tokenizer.problems_with(Path(data["tokenizer"]), sizes.vocab_size if sizes else None):
            problems.append(_problem(resolved, "data", "tokenizer", what, hint))
    elif vocab_size < _SMALLEST_VOCAB_SIZE:
        what = f"the model's vocabulary of {vocab_size} is too small for the built-in tokenizer"
        problems.append(_problem(resolved, "model", "vocab_size", what, f"at least {_SMALLEST_VOCAB_SIZE}"))
    if data["dataset_path"] and data["map_style"]:
        _check_own_data(resolved, Path(data["dataset_path"]), problems)


def _check_own_data(resolved: ResolvedRecipe, path: Path, problems: list[Problem]) -> None:
    if not path.exists():
        problems.append(_problem(resolved, "data", "dataset_path", f"there is no {path}"))
    elif resolved.recipe.data.dataset == "tokens" and not (path / "tokens.json").is_file():
        hint = "the assets/tokens folder of a run that has tokenized it"
        problems.append(_problem(resolved, "data", "dataset_path", f"{path} holds no prepared tokens", hint))
    elif resolved.recipe.data.dataset == "text":
        files = path.rglob("*") if path.is_dir() else [path]
        if not any(file.suffix in _TEXT_FILES for file in files):
            hint = f"known are {', '.join(_TEXT_FILES)}"
            problems.append(_problem(resolved, "data", "dataset_path", f"{path} holds no text", hint))


def _device(resolved: ResolvedRecipe, cluster: str, problems: list[Problem]) -> str:
    wanted = resolved.recipe.slurm.gpus_per_node
    if cluster == "slurm" or wanted == 0:
        return "cuda" if wanted else "cpu"
    from titan_slurm.cluster import local

    here = local.gpu_count()
    # A recipe for a GPU cluster, tried on a laptop: the CPU is the only thing to try it on.
    if here and resolved.layout.world_size > here:
        what = f"{resolved.layout.world_size} ranks on this machine, which has {here} GPUs"
        problems.append(_problem(resolved, "slurm", "gpus_per_node", what, f"--set slurm.gpus_per_node={here}"))
    if not here:
        for misfit in needing_gpus(resolved.recipe, "there is none on this machine"):
            problems.append(_problem(resolved, *misfit.field, misfit.what))
    return "cuda" if here else "cpu"


def _save_folder(resolved: ResolvedRecipe, run: RunDirectory, problems: list[Problem]) -> Path:
    """Where checkpoints go. A folder that two runs shared would let one resume from the other's."""
    given = Path(resolved.recipe.checkpointing.save_dir).expanduser()
    folder = given / run.name if given.is_absolute() else run.path / given
    # Of what stands above it, or is the run's own, a run would be archived without, or removed with.
    if ".." in given.parts or run.owns(folder):
        what = f"{given} is no place for checkpoints: it is the run's own, or leads out of it"
        hint = "a folder of its own in the run, such as ./checkpoints, or an absolute path"
        problems.append(_problem(resolved, "checkpointing", "save_dir", what, hint))
    if not given.is_absolute():
        return folder
    existing = next(folder for folder in (given, *given.parents) if folder.exists())
    try:
        # Only trying tells: root may write everywhere, says os.access, in /proc and on a read-only mount too.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        what = f"{existing} cannot be written: {error.strerror}"
        problems.append(_problem(resolved, "checkpointing", "save_dir", what))
    return folder


def _start_from(resolved: ResolvedRecipe, problems: list[Problem]) -> dict[str, Any]:
    if resolved.recipe.model.initial_weights:
        return _initial_weights(resolved, problems)
    given = resolved.recipe.checkpointing.resume_from_checkpoint
    if not given:
        return {}
    folder = Path(given).expanduser().absolute()
    if not (folder / ".metadata").is_file():
        steps = [path.name for path in folder.glob("step-*")] if folder.is_dir() else []
        hint = did_you_mean(folder.name, steps) or "a step-N folder of a run's checkpoints"
        what = f"there is no checkpoint in {folder}"
        problems.append(_problem(resolved, "checkpointing", "resume_from_checkpoint", what, hint))
    return {"checkpoint.initial_load_path": str(folder)}


def _initial_weights(resolved: ResolvedRecipe, problems: list[Problem]) -> dict[str, Any]:
    folder = Path(resolved.recipe.model.initial_weights or "").expanduser().absolute()
    for what, hint in weights.problems_with(folder, model_sizes(resolved.recipe)):
        problems.append(_problem(resolved, "model", "initial_weights", what, hint))
    return {
        "checkpoint.initial_load_path": str(folder),
        "checkpoint.initial_load_in_hf": True,
        "checkpoint.initial_load_model_only": True,
    }


def _secrets_in(values: Mapping[str, Mapping[str, Any]], arguments: Sequence[str]) -> list[Problem]:
    """What of the values of recipe and cluster profile, as a plan has them, and of a script's arguments must not be
    written into a run, which others may read."""
    what = "holds credentials, which would be written into the run"
    hint = "leave them to the environment, or to ~/.netrc"
    return [
        Problem(value["from"], f"{name}: {what}", hint)
        for name, value in values.items()
        if holds_secret(str(value["value"]))
    ] + [Problem("--script", f"{name}: {what}", hint) for name in secret_arguments(arguments)]


def _problem(resolved: ResolvedRecipe, section: str, field: str, what: str, hint: str = "") -> Problem:
    where = origin(resolved.values, (section, *field.split("."))) or str(resolved.found.path)
    return Problem(where, f"{section}.{field}: {what}", hint)
