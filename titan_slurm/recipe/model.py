"""The sizes of every model that a recipe can name: a flavor of torchtitan's, a Llama by its sizes, or a configuration
of Hugging Face's. How many bytes they take, and where, does not live here."""

from dataclasses import dataclass
from typing import Any

from titan_slurm.recipe import hf_config
from titan_slurm.recipe.mapping import torchtitan_schema
from titan_slurm.recipe.schema import Recipe

SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "intermediate_size")
OPTIONAL_SIZES = ("num_kv_heads", "rope_theta", "max_seq_len")
TRANSFORMERS = "transformers"
# Kinds of Hugging Face's models that have norms after attention and feed-forward too, or of query and key.
_POST_NORMS = ("gemma2", "gemma3_text")
_QUERY_KEY_NORMS = ("qwen3", "gemma3_text")


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """`count` layers in a row that are alike. Parameters are those of one layer, widths are features per token."""

    count: int
    attention: int
    """Parameters of the projections and the norms between them."""
    feed_forward: int
    """Parameters of the dense feed-forward layer, or of the shared experts beside routed ones."""
    router: int
    expert: int
    """Parameters of one routed expert."""
    norms: int
    projections: tuple[int, ...]
    """Output widths of the matrix products of attention, in order of execution."""
    biased: tuple[bool, ...]
    """Which of them add a bias."""
    query: int
    key: int
    value: int
    attended: int
    """Width of what attention hands to its output projection."""
    latent: int
    """Widths of what stands between the input's projections and query, key and value: low ranks, and norms' inputs."""
    gate: int
    """Width of a gate on attention's output, if there is one."""
    post_norms: int
    """Norms after attention and feed-forward, beside the two before them."""
    intermediate_size: int
    """Width of the dense feed-forward layer or the shared experts; 0 if there are none."""
    expert_size: int
    """Width of one routed expert."""

    @property
    def dense(self) -> int:
        """Parameters of one layer without the routed experts."""
        return self.attention + self.feed_forward + self.router + self.norms


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A decoder-only language model, by numbers alone."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_seq_len: int
    tied_weights: bool
    mixture_of_experts: bool
    num_experts: int
    experts_per_token: int
    parameters: int
    """All of them; tied weights count once."""
    active_parameters: int
    """Those that one token meets."""
    embedding: int
    output_head: int
    """0 where its weights are the embedding's."""
    rope_bytes: int
    """Per position, of the table of rotations that each layer holds."""
    flops_per_token: int
    """Of forward and backward by torchtitan's formula, without attention between tokens."""
    flops_per_token_and_position: int
    """What attention adds for each token of the sequence."""
    layers: tuple[LayerSizes, ...]

    @property
    def other(self) -> int:
        """Parameters outside embedding, layers and head: the last norm, and what else a family has."""
        inside = sum(layer.count * (layer.dense + self.num_experts * layer.expert) for layer in self.layers)
        return self.parameters - self.embedding - self.output_head - inside

    def training_flops(self, seq_len: int) -> int:
        """Floating-point operations per token, as torchtitan counts them for its MFU."""
        return self.flops_per_token + self.flops_per_token_and_position * seq_len


def missing_sizes(recipe: Recipe) -> list[str]:
    """The sizes that a model without a flavor still needs."""
    return [name for name in SIZES if getattr(recipe.model, name) is None]


def llama_sizes(recipe: Recipe) -> dict[str, Any]:
    """The sizes of a Llama that a recipe describes by them, with the values of those that it leaves out."""
    model = recipe.model
    left_out = {
        "num_kv_heads": model.num_heads,
        "rope_theta": 500000.0,
        "max_seq_len": recipe.training.seq_len,
    }
    return {name: getattr(model, name) or left_out[name] for name in (*SIZES, *OPTIONAL_SIZES)}


def model_sizes(recipe: Recipe) -> ModelSizes | None:
    """The sizes of the recipe's model; None if it names none rightly, or one of a kind that is not known here."""
    model = recipe.model
    if model.name == TRANSFORMERS:
        return _of_transformers(model.config)
    if model.flavor:
        return _of_torchtitan(torchtitan_schema()["models"].get(model.name, {}).get(model.flavor))
    if missing_sizes(recipe):
        return None
    sizes = llama_sizes(recipe)
    return _decoder(**{name: value for name, value in sizes.items() if name != "rope_theta"}, fused=True)


def _of_torchtitan(flavor: dict[str, Any] | None) -> ModelSizes | None:
    if flavor is None:
        return None
    lists = ("projections", "biased")
    layers = (LayerSizes(**layer | {name: tuple(layer[name]) for name in lists}) for layer in flavor["layers"])
    return ModelSizes(**flavor | {"layers": tuple(layers)})


def _of_transformers(config: str | dict[str, Any] | None) -> ModelSizes | None:
    try:
        contents = hf_config.load(config or {})
    except hf_config.ConfigError:
        return None
    kind = contents["model_type"]
    everywhere = bool(contents["attention_bias"]) and kind not in ("mistral", "qwen2")
    return _decoder(
        vocab_size=contents["vocab_size"],
        embed_dim=contents["hidden_size"],
        num_layers=contents["num_hidden_layers"],
        num_heads=contents["num_attention_heads"],
        num_kv_heads=contents["num_key_value_heads"],
        head_dim=contents["head_dim"],
        intermediate_size=contents["intermediate_size"],
        max_seq_len=contents["max_position_embeddings"],
        tied_weights=bool(contents["tie_word_embeddings"]),
        # Qwen 2 has no switch for them.
        input_bias=everywhere or kind == "qwen2",
        output_bias=everywhere,
        feed_forward_bias=kind == "llama" and bool(contents["mlp_bias"]),
        query_key_norms=kind in _QUERY_KEY_NORMS,
        post_norms=2 if kind in _POST_NORMS else 0,
    )


def _decoder(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    max_seq_len: int,
    head_dim: int = 0,
    tied_weights: bool = False,
    fused: bool = False,
    input_bias: bool = False,
    output_bias: bool = False,
    feed_forward_bias: bool = False,
    query_key_norms: bool = False,
    post_norms: int = 0,
) -> ModelSizes:
    """A dense decoder with grouped-query attention, a gated feed-forward layer and norms without bias."""
    head_dim = head_dim or embed_dim // num_heads
    query, key = num_heads * head_dim, num_kv_heads * head_dim
    inputs = query + 2 * key
    attention = (inputs + query) * embed_dim + input_bias * inputs + output_bias * embed_dim
    attention += 2 * head_dim * query_key_norms
    feed_forward = 3 * embed_dim * intermediate_size + feed_forward_bias * (2 * intermediate_size + embed_dim)
    layer = LayerSizes(
        count=num_layers,
        attention=attention,
        feed_forward=feed_forward,
        router=0,
        expert=0,
        norms=(2 + post_norms) * embed_dim,
        projections=(inputs, embed_dim) if fused else (query, key, key, embed_dim),
        biased=(*[input_bias] * (1 if fused else 3), output_bias),
        query=query,
        key=key,
        value=key,
        attended=query,
        latent=query + key if query_key_norms else 0,
        gate=0,
        post_norms=post_norms,
        intermediate_size=intermediate_size,
        expert_size=0,
    )
    embedding = vocab_size * embed_dim
    output_head = 0 if tied_weights else embedding
    parameters = embedding + num_layers * layer.dense + embed_dim + output_head
    return ModelSizes(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_seq_len=max_seq_len,
        tied_weights=tied_weights,
        mixture_of_experts=False,
        num_experts=0,
        experts_per_token=0,
        parameters=parameters,
        active_parameters=parameters,
        embedding=embedding,
        output_head=output_head,
        rope_bytes=4 * head_dim,
        # torchtitan's get_dense_model_nparams_and_flops: looking up an embedding is no matrix product.
        flops_per_token=6 * (parameters if tied_weights else parameters - embedding),
        flops_per_token_and_position=6 * num_layers * num_heads * 2 * head_dim,
        layers=(layer,),
    )
