"""The plan: recipe, place and overrides resolved into plain values. Made by `launch`, frozen in the run directory,
read by training. How it is computed does not live here."""

from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1
TORCHTITANS_LOOP = "titan_slurm.train.rank"


@dataclass(frozen=True)
class Layout:
    """How the ranks are laid out: pipeline × data × context × tensor; expert borrows from data × tensor."""

    nodes: int
    tasks_per_node: int
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    expert_parallel: int
    data_parallel: int
    data_parallel_replicate: int
    batch_size: int
    global_batch_size: int
    gradient_accumulation_steps: int

    @property
    def world_size(self) -> int:
        """Number of ranks, one Slurm task each."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Plan:
    """Everything a rank needs to know, and where each value came from."""

    name: str
    run_id: str
    """Unique for ever; also the wandb id, so that every attempt continues the same curve."""
    recipe: str
    recipe_version: str
    cluster: str
    """`slurm` or `local`."""
    device: str
    """`cuda` or `cpu`."""
    layout: Layout
    model: dict[str, Any]
    """{"name", "flavor"}, {"name", "sizes"}, or for models of transformers {"name", "config"}: a config.json."""
    data: dict[str, Any]
    optimizer: dict[str, Any]
    activation_checkpointing: str
    wandb: dict[str, Any]
    torchtitan: dict[str, Any]
    """Dotted paths in torchtitan's `Trainer.Config` and their values."""
    slurm: dict[str, Any]
    requeue: dict[str, Any]
    values: dict[str, dict[str, Any]]
    """Each field that was set: {"value": …, "from": "file.toml:12" or "--set" or "environment NAME"}. The recipe's by
    their names, and those of the cluster profile after `cluster.`."""
    profile: dict[str, Any] | None = None
    """The cluster profile, as it was at submission: {"name", "path", "given", "mounts"}."""
    export_to_hf: bool = False
    """Whether the weights after the last step are also written in Hugging Face's format."""
    float8: dict[str, Any] | None = None
    """Matrix products in float8: {"recipe", "filter_fqns", "grouped_experts"}; None if there are none."""
    life: str = TORCHTITANS_LOOP
    """The module whose `live` each rank calls, with the run's path."""
    script: dict[str, Any] | None = None
    """A user's script in the place of torchtitan's loop: {"path" in the run, "folder" where it was, "arguments"}."""
    schema: int = SCHEMA

    @property
    def max_steps(self) -> int:
        """The step after which the run is complete."""
        return int(self.torchtitan["training.steps"])

    @property
    def metrics_rank(self) -> int:
        """The rank that knows the loss, as torchtitan chooses it: the first of the last pipeline stage."""
        # The V-shaped schedule ends where it begins.
        if self.torchtitan.get("parallelism.pipeline_parallel_schedule") == "ZBVZeroBubble":
            return 0
        stages = self.layout.pipeline_parallel
        return self.layout.world_size // stages * (stages - 1)

    @property
    def job_comment(self) -> str:
        """What each of its jobs says of itself in Slurm. By this a job is found whose submission was cut short before
        it was written down."""
        return f"titan-slurm {self.run_id}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Plan":
        """Read a plan back. Raises ValueError for what is no plan of this schema."""
        if not isinstance(values, dict):
            raise ValueError("the plan is not one of this titan-slurm: it is no table")
        if values.get("schema") != SCHEMA:
            raise ValueError(f"the plan has schema {values.get('schema')!r}, this titan-slurm reads {SCHEMA}")
        try:
            return cls(**{**values, "layout": Layout(**values["layout"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan is not one of this titan-slurm: {error}") from None
