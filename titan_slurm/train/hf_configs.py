"""What Hugging Face's config.json says of a model that torchtitan trains."""

from typing import Any


def hf_config(model: Any) -> dict[str, Any] | None:
    """The config.json of a model's configuration, as it is trained; None for a kind of which none is known.

    Llama, Qwen 3, DeepSeek V3 and the models of transformers. Sources: the configuration classes of transformers.
    """
    kind = type(model).__qualname__.removesuffix(".Config")
    if kind == "TransformersModel":
        contents: dict[str, Any] = {**model.hf.to_dict(), "use_cache": True}
        return contents | {"architectures": [model.architecture]}
    describe = {"Llama3Model": _llama, "Qwen3Model": _qwen3, "DeepSeekV3Model": _deepseek_v3}.get(kind)
    return describe(model) if describe else None


def _llama(model: Any) -> dict[str, Any]:
    attention, feed_forward = model.layers[0].attention, model.layers[0].feed_forward
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_decoder(model),
        **_grouped_query(attention, model.dim),
        "intermediate_size": feed_forward.w1.out_features,
    }


def _qwen3(model: Any) -> dict[str, Any]:
    layer = model.layers[0]
    common = {**_decoder(model), **_grouped_query(layer.attention, model.dim), "attention_bias": False}
    if layer.moe is None:
        architecture = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        return {**architecture, **common, "intermediate_size": layer.feed_forward.w1.out_features}
    experts = layer.moe.routed_experts.inner_experts
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **common,
        # Every layer has experts: none has the dense feed-forward layer that this would be the width of.
        "intermediate_size": experts.hidden_dim,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "num_experts": layer.moe.num_experts,
        "num_experts_per_tok": layer.moe.router.top_k,
        "moe_intermediate_size": experts.hidden_dim,
        "norm_topk_prob": layer.moe.router.route_norm,
    }


def _deepseek_v3(model: Any) -> dict[str, Any] | None:
    attention = model.layers[0].attention
    dense = [layer.feed_forward for layer in model.layers if layer.moe is None]
    moe = model.layers[-1].moe
    # The flavors that route by softmax are DeepSeek V2's.
    if moe is None or moe.router.score_func != "sigmoid" or moe.router.num_expert_groups is None:
        return None
    expert = moe.routed_experts.inner_experts.hidden_dim
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **_decoder(model),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": False,
        "first_k_dense_replace": len(dense),
        "intermediate_size": dense[0].w1.out_features if dense else expert,
        "moe_intermediate_size": expert,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts.w1.out_features // expert,
        "num_experts_per_tok": moe.router.top_k,
        "n_group": moe.router.num_expert_groups,
        "topk_group": moe.router.num_limited_groups,
        "norm_topk_prob": moe.router.route_norm,
        "routed_scaling_factor": moe.router.route_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    if "rope_scaling" in config:
        # Equal ones cancel in the rotation and are left in the scale of attention, where torchtitan has its only one.
        config["rope_scaling"] |= {"mscale": attention.mscale, "mscale_all_dim": attention.mscale}
    return config


def _decoder(model: Any) -> dict[str, Any]:
    rope = model.layers[0].attention.rope
    config = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": len(model.layers),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        "max_position_embeddings": rope.max_seq_len,
        "rope_theta": rope.theta,
        "tie_word_embeddings": model.enable_weight_tying,
    }
    scaling = _rope_scaling(rope)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _grouped_query(attention: Any, dim: int) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim or dim // attention.n_heads,
    }


def _rope_scaling(rope: Any) -> dict[str, Any] | None:
    if rope.scaling == "llama":
        return {
            "rope_type": "llama3",
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    if rope.scaling == "yarn" and rope.rope_factor > 1:
        return {
            "rope_type": "yarn",
            "factor": rope.rope_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "original_max_position_embeddings": rope.original_seq_len,
        }
    return None
