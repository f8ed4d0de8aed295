"""What a script says of its recipe. Imports neither torch nor accelerate."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_slurm.accelerate import session
from titan_slurm.errors import BadInputError, bad_input
from titan_slurm.recipe.accelerate import Setup, contradictions, make_setup, problems_with
from titan_slurm.recipe.resolve import Override, ResolvedRecipe, Value, resolve
from titan_slurm.recipe.schema import Recipe
from titan_slurm.toml import Key

USE_VARIABLE = "ACCELERATE_USE_TORCHTITAN"

_logger = logging.getLogger()


class TorchTitanPlugin:
    """A recipe for `Accelerator`.

    job_config: a recipe's tables, a path or name of one, or None for the environment: TORCHTITAN_CONFIG_PATH, and the
    other names that a recipe's values may come from. In a run of `titan-slurm submit --script` the run's own recipe
    counts, which was frozen when it was submitted, whatever is given here.
    model_name: the same as the recipe's `model.name`.

    How many ranks there are is said by who started the script, not by the recipe's `[slurm]`.
    """

    def __init__(
        self, job_config: Mapping[str, Any] | str | os.PathLike[str] | None = None, model_name: str | None = None
    ) -> None:
        self.job_config = job_config
        self.model_name = model_name
        self._resolved: ResolvedRecipe | None = None
        self._setup: Setup | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe with every default in place. Raises BadInputError with everything that is wrong with it."""
        return self._settled()[0].recipe

    @property
    def plan(self) -> Setup:
        """What the recipe comes to on the ranks that there are. Raises as `recipe` does."""
        return self._settled()[1]

    def settle(
        self,
        *,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        has_gpus: bool = True,
        environment: Mapping[str, str] = os.environ,
    ) -> Setup:
        """Read the recipe and check it against what the script says beside it.

        mixed_precision, gradient_accumulation_steps: what `Accelerator` was given; they count where the recipe says
        nothing. Raises BadInputError with every problem.
        """
        said: dict[Key, Value] = {}
        if mixed_precision in ("no", "bf16"):
            precision = "bf16" if mixed_precision == "bf16" else "fp32"
            said["training", "mixed_precision"] = Value(precision, "Accelerator(mixed_precision=…)")
        steps = gradient_accumulation_steps or 1
        said["training", "gradient_accumulation_steps"] = Value(steps, "Accelerator(gradient_accumulation_steps=…)")
        resolved = self._resolve(said, environment, has_gpus=has_gpus)
        problems = problems_with(resolved, has_gpus=has_gpus)
        problems += contradictions(
            resolved,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            environment=environment,
        )
        if problems:
            raise BadInputError(problems)
        self._resolved, self._setup = resolved, make_setup(resolved)
        return self._setup

    def _settled(self) -> tuple[ResolvedRecipe, Setup]:
        if self._resolved is None or self._setup is None:
            self.settle()
        assert self._resolved is not None and self._setup is not None
        return self._resolved, self._setup

    def _resolve(self, said: Mapping[Key, Value], environment: Mapping[str, str], *, has_gpus: bool) -> ResolvedRecipe:
        ranks = int(environment.get("WORLD_SIZE", "1"))
        per_node = min(ranks, int(environment.get("LOCAL_WORLD_SIZE", ranks)))
        overrides = [
            Override(("slurm", "nodes"), ranks // per_node, "environment WORLD_SIZE"),
            Override(("slurm", "tasks_per_node"), per_node, "environment LOCAL_WORLD_SIZE"),
        ]
        if not has_gpus:
            overrides.append(Override(("slurm", "gpus_per_node"), 0, "this machine"))
        now = session.current()
        if now is not None:
            if self.job_config is not None and now.rank == 0:
                _logger.info(f"The run's own recipe counts, not the script's job_config: {now.run.recipe_file}")
            layout = now.plan.layout
            overrides[0] = Override(("slurm", "nodes"), layout.nodes, "the run's plan")
            overrides[1] = Override(("slurm", "tasks_per_node"), layout.tasks_per_node, "the run's plan")
            # Its values of the environment are in it already.
            return resolve(str(now.run.recipe_file), overrides, {}, said, own_model=True)
        if self.model_name:
            overrides.append(Override(("model", "name"), self.model_name, f"model_name={self.model_name!r}"))
        return resolve(_as_named(self.job_config), overrides, environment, said, own_model=True)


def from_environment(environment: Mapping[str, str] = os.environ) -> TorchTitanPlugin | None:
    """The plugin of a script that names none: in a run, or where ACCELERATE_USE_TORCHTITAN is true."""
    wanted = environment.get(USE_VARIABLE, "").lower() in ("true", "1", "yes")
    return TorchTitanPlugin() if wanted or session.current() is not None else None


def _as_named(job_config: object) -> Mapping[str, Any] | str | None:
    if isinstance(job_config, Mapping):
        return _without_nothing(job_config)
    if isinstance(job_config, os.PathLike):
        return str(Path(job_config))
    if job_config is None or isinstance(job_config, str):
        return job_config
    what = f"{job_config!r} is of type {type(job_config).__name__}"
    raise bad_input("job_config", what, "a dict of a recipe's tables, a recipe's path or name, or None")


def _without_nothing(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The same without None, which in Python is how to leave a value out."""
    if wrong := [name for name in tables if not isinstance(name, str)]:
        raise bad_input("job_config", f"{wrong[0]!r} is no name of a table or field", '{"training": {"seq_len": 2048}}')
    return {
        name: _without_nothing(value) if isinstance(value, Mapping) else value
        for name, value in tables.items()
        if value is not None
    }
