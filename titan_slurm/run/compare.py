"""Two runs side by side: what they were to train, what they trained with, and what came of it, step by step."""

from dataclasses import asdict, dataclass
from typing import Any

from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import finite, read_json
from titan_slurm.run.lock import differences

# What every run has of its own.
_NOT_COMPARED = ("name", "run_id", "values", "schema", "torchtitan.checkpoint.folder", "profile.mounts")
# A step's results; times and memory are never the same.
_RESULTS = ("loss", "grad_norm")

Pair = list[Any]


@dataclass(frozen=True)
class Step:
    """A step that both runs have logged: the results of the one and of the other."""

    step: int
    loss: Pair
    grad_norm: Pair

    @property
    def is_same(self) -> bool:
        """Whether both came out the same, to the last bit."""
        return equal(*self.loss) and equal(*self.grad_norm)


@dataclass(frozen=True)
class Comparison:
    """What is not the same, by name: [of the one, of the other], None where it is on one side only; and all steps."""

    recipe: dict[str, Pair]
    environment: dict[str, Pair]
    steps: list[Step]
    only: Pair
    """How many steps only the one and only the other has logged."""

    @property
    def first_difference(self) -> Step | None:
        """The first step that came out otherwise."""
        return next((step for step in self.steps if not step.is_same), None)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; what is no number is null."""
        first = self.first_difference
        plain: dict[str, Any] = finite(asdict(self) | {"first_difference": asdict(first) if first else None})
        return plain


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same, as one NaN is to another."""
    return bool(one == other or (one != one and other != other))


def compare(one: RunDirectory, other: RunDirectory) -> Comparison:
    """Compare two runs by what is in their folders."""
    curves = [{line["step"]: line for line in run.curve()} for run in (one, other)]
    both = sorted(curves[0].keys() & curves[1].keys())
    steps = [Step(step, *([curve[step].get(name) for curve in curves] for name in _RESULTS)) for step in both]
    return Comparison(
        recipe=differences(_recipe(one), _recipe(other)),
        environment=differences(_environment(one), _environment(other)),
        steps=steps,
        only=[len(curve) - len(both) for curve in curves],
    )


def _recipe(run: RunDirectory) -> dict[str, Any]:
    """Everything that was planned, by dotted name."""
    flat = _flat(run.plan().to_dict())
    return {name: value for name, value in flat.items() if not f"{name}.".startswith(_own)}


_own = tuple(f"{name}." for name in _NOT_COMPARED)


def _environment(run: RunDirectory) -> dict[str, Any]:
    """What the run's lock knows of code, versions, machines and data."""
    locked = read_json(run.lock_file) or {}
    trained = locked.get("trained", {})
    code = locked.get("code", {})
    found = {
        "code.hash": code.get("hash"),
        "code.script": code.get("script"),
        "code.commit": code.get("package", {}).get("commit"),
        "nodes": len(trained["nodes"]) if "nodes" in trained else None,
        "processors": trained.get("processors"),
        "gpus": trained.get("gpus"),
        **trained.get("versions", {}),
        **{f"package {name}": version for name, version in trained.get("packages", {}).items()},
    }
    for name, each in (locked.get("data", {}) | trained.get("assets", {})).items():
        known = each.get("fingerprint") or each
        found[f"data.{name}"] = known.get("sha256")
    return {name: value for name, value in found.items() if value is not None}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
