"""torchtitan's models by family and flavor, small ones beside them, a Llama of any size, and models of transformers."""

import importlib
from typing import Any

_TRANSFORMERS = "transformers"


def model_spec(model: dict[str, Any]) -> Any:
    """The ModelSpec for a plan's model: {"name", "flavor"}, {"name": "llama3", "sizes": {…}}, or {"name":
    "transformers", "config": what stands in a config.json}."""
    if model["name"] == _TRANSFORMERS:
        from titan_slurm.train import transformers_models

        return transformers_models.spec(model["config"])
    if model.get("sizes"):
        return _sized_llama(model["sizes"])
    register_small_flavors()
    family = importlib.import_module(f"torchtitan.models.{model['name']}")
    return family.model_registry(model["flavor"])


def register_small_flavors() -> None:
    """Put models of a few million parameters, for a CPU, beside torchtitan's own flavors, whose debug models have 32 to
    316 million. All have the built-in tokenizer's vocabulary of 2048."""
    from torchtitan.models import deepseek_v3, qwen3

    qwen3.qwen3_configs |= {"debug": _debug_qwen3, "moe_debug": _debug_qwen3_moe}
    deepseek_v3.deepseekv3_configs |= {"debug": _debug_deepseek_v3}


def _sized_llama(sizes: dict[str, Any]) -> Any:
    """A Llama by sizes alone; parameters and logits equal those of Hugging Face's LlamaForCausalLM.

    sizes: vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, intermediate_size, rope_theta, max_seq_len.
    """
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    dim, vocab_size = sizes["embed_dim"], sizes["vocab_size"]

    def build(attn_backend: str, tp_gemm_backend: Any = "default") -> Any:
        norm = {"normalized_shape": dim, "param_init": llama3._NORM_INIT}
        return llama3.Llama3Model.Config(
            dim=dim,
            vocab_size=vocab_size,
            tok_embeddings=Embedding.Config(
                num_embeddings=vocab_size, embedding_dim=dim, param_init=llama3._EMBEDDING_INIT
            ),
            norm=RMSNorm.Config(**norm),
            lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=llama3._output_linear_init(dim)),
            layers=llama3._build_llama3_layers(
                n_layers=sizes["num_layers"],
                dim=dim,
                n_heads=sizes["num_heads"],
                n_kv_heads=sizes["num_kv_heads"],
                hidden_dim=sizes["intermediate_size"],
                rope=ComplexRoPE.Config(
                    dim=dim // sizes["num_heads"], max_seq_len=sizes["max_seq_len"], theta=sizes["rope_theta"]
                ),
                attn_backend=attn_backend,
                tp_gemm_backend=tp_gemm_backend,
            ),
        )

    # The registry is how torchtitan finds a model by its flavor, in checkpoints' adapters too.
    llama3.llama3_configs["custom"] = build
    return llama3.model_registry("custom")


_DIM, _LAYERS, _VOCAB_SIZE, _SEQ_LEN = 192, 4, 2048, 4096


def _debug_qwen3(attn_backend: str) -> Any:
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE

    layers = qwen3._build_qwen3_layers(
        n_layers=_LAYERS,
        dim=_DIM,
        n_heads=6,
        n_kv_heads=2,
        head_dim=32,
        hidden_dim=512,
        attn_backend=attn_backend,
        rope=CosSinRoPE.Config(dim=32, max_seq_len=_SEQ_LEN, theta=1e6),
    )
    return _qwen3(layers, tied=True)


def _debug_qwen3_moe(attn_backend: str, moe_comm_backend: str = "standard") -> Any:
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE

    layers = qwen3._build_qwen3_moe_layers(
        n_layers=_LAYERS,
        dim=_DIM,
        n_heads=6,
        n_kv_heads=2,
        head_dim=32,
        moe_hidden_dim=192,
        num_experts=8,
        top_k=2,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        rope=CosSinRoPE.Config(dim=32, max_seq_len=_SEQ_LEN, theta=1e6),
    )
    return _qwen3(layers, tied=False)


def _qwen3(layers: list[Any], *, tied: bool) -> Any:
    from torchtitan.models import qwen3
    from torchtitan.models.common import Embedding, Linear

    return qwen3.Qwen3Model.Config(
        vocab_size=_VOCAB_SIZE,
        dim=_DIM,
        norm=qwen3._qwen3_norm(_DIM),
        enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=_VOCAB_SIZE,
            embedding_dim=_DIM,
            # Of tied weights, the output layer's initial values are taken.
            param_init=qwen3._EMBEDDING_SKIP_INIT if tied else qwen3._EMBEDDING_INIT,
        ),
        lm_head=Linear.Config(in_features=_DIM, out_features=_VOCAB_SIZE, param_init=qwen3._LINEAR_INIT),
        layers=layers,
    )


def _debug_deepseek_v3(
    attn_backend: str,
    moe_comm_backend: str = "standard",
    non_blocking_capacity_factor: float | None = None,
    num_mtp_layers: int = 0,
) -> Any:
    """All that the 671B has: low ranks for queries and keys, a dense layer, routing by groups, a shared expert."""
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    layers = deepseek_v3._build_dsv3_layers(
        n_layers=_LAYERS,
        n_dense_layers=1,
        dim=_DIM,
        n_heads=6,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        mscale=1.0,
        dense_hidden_dim=512,
        moe_hidden_dim=128,
        num_experts=8,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="sigmoid",
        router_num_expert_groups=4,
        router_num_limited_groups=2,
        router_route_scale=2.5,
        router_route_norm=True,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        non_blocking_capacity_factor=non_blocking_capacity_factor,
        rope=ComplexRoPE.Config(dim=16, max_seq_len=_SEQ_LEN, theta=1e4),
    )
    return deepseek_v3.DeepSeekV3Model.Config(
        vocab_size=_VOCAB_SIZE,
        dim=_DIM,
        tok_embeddings=Embedding.Config(
            num_embeddings=_VOCAB_SIZE, embedding_dim=_DIM, param_init=deepseek_v3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=_DIM, param_init=deepseek_v3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=_DIM, out_features=_VOCAB_SIZE, param_init=deepseek_v3._output_linear_init(_DIM)
        ),
        layers=layers,
        mtp_layers=deepseek_v3._build_mtp_layers(layers[-1], dim=_DIM, num_mtp_layers=num_mtp_layers),
    )
