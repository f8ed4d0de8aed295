"""Models of the transformers library as torchtitan trains them: torchtitan's experimental backend, put right where its
models would compute something else than transformers does. Needs the package transformers."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.nn.attention.flex_attention import BlockMask, and_masks
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.transformers_modeling_backend import model as backend
from torchtitan.experiments.transformers_modeling_backend.parallelize import parallelize_hf_transformers
from torchtitan.experiments.transformers_modeling_backend.pipeline import pipeline_hf_transformers
from torchtitan.experiments.transformers_modeling_backend.state_dict_adapter import HFTransformerStateDictAdapter
from torchtitan.models.common.attention import (
    create_attention_mask,
    get_causal_mask_mod,
    get_document_mask_mod,
    get_sliding_window_mask_mod,
)
from torchtitan.models.common.decoder_sharding import pre_lm_head_norm_config
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

_ATTENTION = "titan_slurm"
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Said elsewhere: by training.dtype.
_NOT_OF_THE_MODEL = ("model_type", "dtype", "torch_dtype")


class ScaledEmbedding(Embedding):
    """Gemma's embedding, which transformers scales by a buffer that tensor parallelism does not know."""

    scalar_embed_scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids to embeddings times the scale, which is rounded to the weights' type as in transformers."""
        scale = torch.tensor(self.scalar_embed_scale, dtype=self.weight.dtype).item()
        return super().forward(input) * scale


class SoftcappedHead(nn.Linear):
    """Gemma 2's output layer: in the layer itself, its cap also holds where the loss is computed in chunks."""

    softcap: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Hidden states to logits between -softcap and softcap."""
        return self.softcap * torch.tanh(super().forward(input) / self.softcap)


class TransformersModel(backend.HFTransformerModel):
    """A causal language model of transformers; what it computes and how its weights begin are as there."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        contents: dict[str, Any]
        """What stands in a config.json, of a language model only."""
        max_seq_len: int = 0
        """The training's."""

        @property
        def hf(self) -> PretrainedConfig:
            """The configuration as transformers has it."""
            settings = {name: value for name, value in self.contents.items() if name not in _NOT_OF_THE_MODEL}
            config = AutoConfig.for_model(self.contents["model_type"], **settings)
            config.use_cache = False
            config._attn_implementation = _ATTENTION
            return config

        @property
        def architecture(self) -> str:
            """The name of the model's class in transformers."""
            return str(AutoModelForCausalLM._model_mapping[type(self.hf)].__name__)  # type: ignore[attr-defined]

        @property
        def vocab_size(self) -> int:
            return int(self.contents["vocab_size"])

        @property
        def n_layers(self) -> int:
            return int(self.contents["num_hidden_layers"])

        @property
        def tie_word_embeddings(self) -> bool:
            return bool(self.hf.tie_word_embeddings)

        def update_from_config(self, *, config: Any, **_: Any) -> None:
            """Take the length of the training's sequences."""
            self.max_seq_len = config.training.seq_len

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Number of parameters, and of floating-point operations per token."""
            hf = self.hf
            head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
            return get_dense_model_nparams_and_flops(
                model, self.n_layers, hf.num_attention_heads, 2 * head_dim, seq_len, self.tie_word_embeddings
            )

    def __init__(self, config: Config) -> None:
        # Not torchtitan's, which changes transformers' classes for the whole process, and the biases of attention.
        super(backend.HFTransformerModel, self).__init__()
        self.config = config
        backend.AttentionInterface.register(_ATTENTION, _attention)
        self.model = AutoModelForCausalLM.from_config(config.hf)
        self.max_seq_len = config.max_seq_len
        self.cp_mesh = None
        inner = self.model.model
        inner.layers = backend.SliceableModuleDict({str(number): layer for number, layer in enumerate(inner.layers)})
        for layer in inner.layers:
            layer.moe_enabled = False
        _scale_here(inner.embed_tokens)
        # There is no padding in these batches: id 0 is a token as any other.
        inner.embed_tokens.padding_idx = None
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap:
            self.model.lm_head.__class__ = SoftcappedHead
            self.model.lm_head.softcap = cap

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """As torchtitan's, with whole sequences before the output layer: the loss is computed in chunks of them."""
        enable_sp = parallel_dims.tp_enabled
        if not isinstance(self.norm, nn.Identity):
            self.norm._sharding_config = _renamed_input(pre_lm_head_norm_config(enable_sp=enable_sp))
        if not isinstance(self.lm_head, nn.Identity):
            head = self.lm_head._sharding_config
            head.in_src_shardings = head.in_dst_shardings
        super().parallelize(parallel_dims)

    def get_attention_masks(self, positions: torch.Tensor) -> Any:
        """Causal, within documents and within the sliding window; by kind of layer where there is more than one.

        positions: int [batch, sequence], from 0 in each document.
        """
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or [_SLIDING if window else _FULL])
        masks = {kind: _mask(positions, window if kind == _SLIDING else None) for kind in kinds}
        return masks if getattr(config, "layer_types", None) else masks.popitem()[1]

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:  # noqa: ARG002 (torchtitan's signature)
        """Give weights and buffers the values that transformers gives them."""
        for module in self.model.modules():
            if not isinstance(module, nn.Identity):
                for state in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    # Said of them when they had no memory yet.
                    state._is_hf_initialized = False
                self.model._init_weights(module)
        if self.model.config.tie_word_embeddings:
            self.lm_head.weight = self.tok_embeddings.weight


class TransformersAdapter(HFTransformerStateDictAdapter):
    """Between torchtitan's names of weights and transformers' own."""

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:  # noqa: ARG002
        """A reader of a folder with safetensors, of a language model or of a composite one that has one in it."""
        return _LanguageModelReader(path)


class _LanguageModelReader(HuggingFaceStorageReader):
    """Finds a composite model's language model under the names that it has by itself."""

    def read_metadata(self) -> Any:
        metadata = super().read_metadata()
        self._names = {_name_alone(name): name for name in metadata.state_dict_metadata}
        metadata.state_dict_metadata = {
            _name_alone(name): tensor for name, tensor in metadata.state_dict_metadata.items()
        }
        metadata.storage_data = {
            dataclasses.replace(index, fqn=_name_alone(index.fqn)): info
            for index, info in metadata.storage_data.items()
        }
        return metadata

    def _process_read_request(self, f: Any, req: Any, planner: Any) -> None:
        names = self._names
        super()._process_read_request(SimpleNamespace(get_slice=lambda name: f.get_slice(names[name])), req, planner)


def _name_alone(name: str) -> str:
    """The name of a weight of a composite model's language model as it is without the rest; others stay as they are."""
    return name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)


def spec(contents: dict[str, Any]) -> ModelSpec:
    """The ModelSpec of a configuration in Hugging Face's format."""
    return ModelSpec(
        name="transformers",
        flavor=contents["model_type"],
        model=TransformersModel.Config(contents=contents),
        parallelize_fn=parallelize_hf_transformers,
        pipelining_fn=pipeline_hf_transformers,
        post_optimizer_build_fn=None,
        state_dict_adapter=TransformersAdapter,
    )


def _scale_here(embedding: nn.Embedding) -> None:
    """Turn transformers' scaled embedding into ScaledEmbedding; leave any other."""
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is not None:
        del embedding.embed_scale
        embedding.__class__ = ScaledEmbedding
        embedding.tp_group = None


def _renamed_input(config: Any) -> Any:
    """torchtitan's norms take `input`, transformers' take `hidden_states`."""
    config.in_src_shardings = {"hidden_states": config.in_src_shardings["input"]}
    return config


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [batch, heads, sequence, head_dim] to [batch, sequence, heads, …]."""
    if isinstance(attention_mask, BlockMask):
        out, _ = backend._flex_attention_torchtitan(module, query, key, value, attention_mask, **options)
        return out, None
    softcap, scale = options.get("softcap"), options["scaling"]
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True
        )
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
        out = scores.masked_fill(~attention_mask, -torch.inf).float().softmax(dim=-1).to(value.dtype) @ value
    return out.transpose(1, 2).contiguous(), None


def _mask(positions: torch.Tensor, window: int | None) -> Any:
    """A block mask for FlexAttention; on a CPU the same as booleans [batch, 1, query, key]."""
    inside = get_causal_mask_mod() if window is None else get_sliding_window_mask_mod(window)
    allowed = and_masks(inside, get_document_mask_mod(positions))
    batch, length = positions.shape
    if positions.device.type == "cpu":
        return _dense(allowed, batch, length)
    return create_attention_mask(allowed, batch, None, length, length, device=positions.device)


def _dense(allowed: Callable[..., torch.Tensor], batch: int, length: int) -> torch.Tensor:
    index = torch.arange(length)
    return allowed(torch.arange(batch)[:, None, None, None], None, index[:, None], index)
