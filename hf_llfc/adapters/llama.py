"""The Llama line: RMSNorm before each block, rotary positions, grouped queries, gated MLPs or routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    attention,
    embedding,
    gated_mlp,
    head,
    heads_of,
    layers,
    linear,
    mixture_of_experts,
    rms_norm,
    within,
)
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config

    from hf_llfc.symmetry.spec import PermutationSpec

    DecoderConfig = LlamaConfig | MistralConfig | MixtralConfig | Qwen2Config | Qwen3Config


def llama(config: DecoderConfig) -> PermutationSpec:
    """Llama, Mistral, Qwen2 and Qwen3 with any of their heads."""
    return _decoder(
        config,
        gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        {"neurons": config.intermediate_size},
    )


def mixtral(config: MixtralConfig) -> PermutationSpec:
    """Mixtral: a router and one gated MLP per expert."""
    return _decoder(
        config,
        mixture_of_experts("block_sparse_moe.gate", "block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
        {"neurons": config.intermediate_size, "experts": config.num_local_experts},
        symmetric=("experts",),
    )


def _decoder(
    config: DecoderConfig,
    feed_forward: Sequence[str],
    sizes: dict[str, int],
    symmetric: Sequence[str] = (),
) -> PermutationSpec:
    # A config may leave head_dim out or set it to None; both mean an even split of the residual stream.
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    heads = heads_of(config.num_attention_heads, config.num_key_value_heads, head_dim=head_dim)
    return declare(
        config,
        within(
            "model",
            embedding("embed_tokens"),
            layers(
                "layers",
                config.num_hidden_layers,
                rms_norm("input_layernorm"),
                attention(
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.o_proj",
                    heads,
                ),
                ["self_attn.q_norm.weight?  head_dim", "self_attn.k_norm.weight?  head_dim"],
                ["self_attn.rotary_emb.inv_freq?  frequencies"],
                rms_norm("post_attention_layernorm"),
                feed_forward,
            ),
            rms_norm("norm"),
        ),
        linear("lm_head", "vocab", "residual", optional=True),
        head("score"),
        head("qa_outputs"),
        sizes={
            "vocab": config.vocab_size,
            "residual": config.hidden_size,
            "labels": None,
            "frequencies": None,
            **heads.sizes,
            **sizes,
        },
        symmetric=("residual", *heads.symmetric, "neurons", *symmetric),
        outputs=("residual",),
        prefix="model.",
        other_prefixes=("transformer.",),  # LlamaForQuestionAnswering and its kin
    )
