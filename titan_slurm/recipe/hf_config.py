"""Configurations in Hugging Face's format (a config.json), read and checked without transformers: what a recipe's
`[model] config` says. What such a model's sizes mean for memory and parallelism does not live here."""

import json
from pathlib import Path
from typing import Any

from titan_slurm.errors import did_you_mean

# The sizes that a configuration must have, and for each tested kind of model what transformers takes where the others
# are left out; None is hidden_size / num_attention_heads, or num_attention_heads.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_GEMMA = _LLAMA | {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"num_key_value_heads": 4, "sliding_window": 4096},
    # The language model of a composite gemma3, whose file says only what differs from these.
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
_COMPOSITE = {"gemma3": "gemma3_text"}
MODEL_TYPES = (*DEFAULTS, *_COMPOSITE)
"""The kinds of models that a recipe may name: those whose logits and gradients are tested against transformers."""


class ConfigError(ValueError):
    """A configuration that cannot be used: what is wrong, what would be right, and the key at fault if it is one."""

    def __init__(self, what: str, hint: str = "", key: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.field = f"config.{key}" if key else "config"


class NoConfigError(ConfigError):
    """There is no such file here; elsewhere there may be."""


def load(config: str | dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration: a folder with a config.json, or its contents.

    Every key of DEFAULTS is in it. Raises ConfigError.
    """
    contents = config if isinstance(config, dict) else _read(Path(config).expanduser())
    kind = contents.get("model_type")
    if kind not in MODEL_TYPES:
        if kind is None:
            raise ConfigError("has no model_type", f"one of {', '.join(MODEL_TYPES)}")
        hint = did_you_mean(str(kind), MODEL_TYPES) or f"one of {', '.join(MODEL_TYPES)}"
        raise ConfigError(f"{kind!r} is not one of the kinds that are tested", hint, "model_type")
    if kind in _COMPOSITE:
        # A composite without that part is a language model under the older name.
        contents = contents.get("text_config", contents) | {"model_type": _COMPOSITE[kind]}
    contents = DEFAULTS[contents["model_type"]] | contents
    _check(contents)
    heads, width = contents["num_attention_heads"], contents["hidden_size"]
    contents["num_key_value_heads"] = contents["num_key_value_heads"] or heads
    contents["head_dim"] = contents["head_dim"] or width // heads
    return contents


def layer_types(contents: dict[str, Any]) -> list[str]:
    """Each layer's attention, of what `load` returned: "full_attention" or "sliding_attention"."""
    layers = range(contents["num_hidden_layers"])
    if contents.get("layer_types"):
        return list(contents["layer_types"])
    match contents["model_type"]:
        case "mistral":
            return ["sliding_attention" if contents.get("sliding_window") else "full_attention" for _ in layers]
        case "gemma2" | "gemma3_text":
            every = 2 if contents["model_type"] == "gemma2" else contents.get("sliding_window_pattern", 6)
            return ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in layers]
        case "qwen2" | "qwen3" if contents.get("use_sliding_window"):
            first = contents.get("max_window_layers", 28)
            return ["sliding_attention" if layer >= first else "full_attention" for layer in layers]
        case _:
            return ["full_attention" for _ in layers]


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoConfigError(f"there is no {file}", "a folder with a model's config.json, or a table") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{file} is no table")
    return contents


def _check(contents: dict[str, Any]) -> None:
    missing = [name for name in _SIZES if name not in contents]
    if missing:
        raise ConfigError(f"has no {', '.join(missing)}")
    for name in (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = contents[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{value!r} must be a whole number greater than 0", key=name)
    heads, kv_heads = contents["num_attention_heads"], contents["num_key_value_heads"] or 1
    if heads % kv_heads:
        raise ConfigError(f"{kv_heads} does not divide num_attention_heads {heads}", key="num_key_value_heads")
    if contents["head_dim"] is None and contents["hidden_size"] % heads:
        raise ConfigError(f"{heads} does not divide hidden_size {contents['hidden_size']}", key="num_attention_heads")
    if contents.get("attention_dropout"):
        raise ConfigError("must be 0: the attention that trains knows none", key="attention_dropout")
    if contents.get("use_bidirectional_attention"):
        what = "must be false: the model is trained to predict what follows"
        raise ConfigError(what, key="use_bidirectional_attention")
