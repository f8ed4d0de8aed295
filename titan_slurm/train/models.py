"""torchtitan's models by family and flavor, and a Llama of any size."""

import importlib
from typing import Any


def model_spec(model: dict[str, Any]) -> Any:
    """The ModelSpec for a plan's model: {"name", "flavor"}, or {"name": "llama3", "sizes": {…}}."""
    if model.get("sizes"):
        return _sized_llama(model["sizes"])
    family = importlib.import_module(f"torchtitan.models.{model['name']}")
    return family.model_registry(model["flavor"])


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
