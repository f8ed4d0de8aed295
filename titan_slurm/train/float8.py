"""A model with its matrix products in float8, as torchtitan converts it. Which products are worth it is the recipe's
to say."""

import importlib.util
from typing import Any

# What a filter may name whether or not the model has it: the output layer, a mixture's router, and torchtitan's word
# for layers that are too small to be faster in float8.
_EVERYWHERE = ("lm_head", "router.gate", "auto_filter_small_kn")


def to_float8(model: Any, settings: dict[str, Any], *, compiled: bool) -> Any:
    """The model's configuration with float8 in place of its linear layers.

    settings: {"recipe", "filter_fqns", "grouped_experts"}, as in the recipe's `[float8]`. compiled: whether the model's
    layers are. Raises RuntimeError without torchao, ValueError for a filter that names no layer, or all of them.
    """
    if importlib.util.find_spec("torchao") is None:
        raise RuntimeError("float8 needs the package torchao (pip install 'titan-slurm[float8]')")

    from torchtitan.components.quantization import Float8GroupedExpertsConverter, Float8LinearConverter
    from torchtitan.components.quantization.utils import has_quantization
    from torchtitan.models.common.linear import Linear

    names = [name for name, *_ in model.traverse(Linear.Config)]
    for skipped in settings["filter_fqns"]:
        if skipped not in _EVERYWHERE and not any(skipped in name for name in names):
            raise ValueError(f"float8.filter_fqns: no linear layer of the model has {skipped!r} in its name")
    converters = [
        Float8LinearConverter.Config(
            recipe_name=settings["recipe"], filter_fqns=settings["filter_fqns"], model_compile_enabled=compiled
        )
    ]
    if settings["grouped_experts"]:
        converters.append(Float8GroupedExpertsConverter.Config(model_compile_enabled=compiled))
    for converter in converters:
        model = converter.build().convert(model)
    if not has_quantization(model):
        raise ValueError("float8.filter_fqns: leaves no layer to be computed in float8")
    return model
