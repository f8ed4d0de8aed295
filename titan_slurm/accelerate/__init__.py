"""For scripts that keep Hugging Face Accelerate's loop: its `Accelerator`, set up from a recipe, and started, stopped,
saved and brought back as every run of titan-slurm.

    from titan_slurm.accelerate import Accelerator, TorchTitanPlugin

    accelerator = Accelerator(torchtitan_plugin=TorchTitanPlugin("recipe.toml"))
"""

from typing import TYPE_CHECKING, Any

from titan_slurm.accelerate.plugin import TorchTitanPlugin

if TYPE_CHECKING:
    from titan_slurm.accelerate.accelerator import Accelerator

__all__ = ["Accelerator", "TorchTitanPlugin"]


def __getattr__(name: str) -> Any:
    # A plugin can be made, and its plan looked at, without torch.
    if name == "Accelerator":
        from titan_slurm.accelerate.accelerator import Accelerator

        return Accelerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
