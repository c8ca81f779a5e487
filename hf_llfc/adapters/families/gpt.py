"""The GPT line before Llama: learned or ALiBi positions, LayerNorm, fused projections of several layouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    conv1d,
    embedding,
    head,
    heads_of,
    layers,
    linear,
    mlp,
    norm,
    within,
)
from hf_llfc.adapters.compose import occurring
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.llama import rotary_channels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

# Buffers of old checkpoints: the causal mask, and what a masked score became.
OLD_BUFFERS = ("bias?  1 1 positions positions", "masked_bias?", "rotary_emb.inv_freq?  frequencies")

# CodeGen's projections are laid out for the four cores of the machine it was trained on.
CODEGEN_CORES = 4


def _gpt(
    config: PreTrainedConfig,
    root: str,
    *blocks: Sequence[str],
    heads: Heads,
    neurons: int | None = None,
    output: str = "lm_head",
    fixed: Iterable[str] = (),
    **sizes: int | None,
) -> PermutationSpec:
    """A decoder with any of its heads; `blocks` are below `root`, `output` gives the tokens."""
    lines = [
        *within(root, *blocks),
        *head(output, out="vocab"),
        *head("score"),
        *head("classifier"),
        *head("qa_outputs"),
    ]
    width = config.hidden_size
    return declare(
        config,
        lines,
        sizes={
            "vocab": config.vocab_size,
            "positions": None,
            "frequencies": None,
            "residual": width,
            "neurons": neurons or 4 * width,
            "labels": None,
            **heads.sizes,
            **sizes,
        },
        symmetric=[
            axis
            for axis in occurring(("residual", *heads.symmetric, "neurons", "experts"), lines)
            if axis not in tuple(fixed)
        ],
        outputs=("residual",),
        prefix=f"{root}.",
        other_prefixes=() if root == "transformer" else ("transformer.",),
    )


def _free_heads(config: PreTrainedConfig) -> Heads:
    count = config.num_attention_heads
    return heads_of(count, head_dim=config.hidden_size // count, free_channels=True)


def _partly_rotary_heads(config: PreTrainedConfig, rotary_dim: int) -> Heads:
    count = config.num_attention_heads
    head_dim = config.hidden_size // count
    return heads_of(count, head_dim=head_dim, rotary_dim=rotary_dim)


def gpt_neo(config: PreTrainedConfig) -> PermutationSpec:
    """GPT-Neo with any of its heads."""
    heads = _free_heads(config)
    return _gpt(
        config,
        "transformer",
        embedding("wte"),
        embedding("wpe", rows="positions"),
        layers(
            "h",
            config.num_layers,
            norm("ln_1"),
            within(
                "attn.attention",
                attention("q_proj", "k_proj", "v_proj", "out_proj", heads, bias=False, output_bias=True),
                OLD_BUFFERS,
            ),
            norm("ln_2"),
            mlp("mlp.c_fc", "mlp.c_proj", bias=True),
        ),
        norm("ln_f"),
        heads=heads,
        neurons=config.intermediate_size,
    )


def gptj(config: PreTrainedConfig) -> PermutationSpec:
    """GPT-J with any of its heads."""
    heads = _partly_rotary_heads(config, config.rotary_dim)
    return _gpt(
        config,
        "transformer",
        embedding("wte"),
        layers(
            "h",
            config.n_layer,
            norm("ln_1"),
            within("attn", attention("q_proj", "k_proj", "v_proj", "out_proj", heads), OLD_BUFFERS),
            mlp("mlp.fc_in", "mlp.fc_out", bias=True),
        ),
        norm("ln_f"),
        heads=heads,
        neurons=config.n_inner,
    )


def codegen(config: PreTrainedConfig) -> PermutationSpec:
    """CodeGen with any of its heads."""
    head_dim = config.n_embd // config.n_head
    # A head is an index along two axes, which a channel cannot depend on both: it moves alike in a core's heads.
    rotary = f"rotary{' + head_dim.{i}[cores]' if config.rotary_dim < head_dim else ''}"
    own, value = f"(heads.{{i}}[cores] {rotary})", "(heads.{i}[cores] value_dim.{i}[cores])"
    heads = Heads(
        queries=f"(cores.{{i}} heads.{{i}}[cores] {rotary})",
        keys=f"(cores.{{i}} heads.{{i}}[cores] {rotary})",
        values="(cores.{i} heads.{i}[cores] value_dim.{i}[cores])",
        output="(cores.{i} heads.{i}[cores] value_dim.{i}[cores])",
        by_head=f"(cores.{{i}} {own} + {value} + {own})",
        query_heads="(cores.{i} heads.{i}[cores])",
        key_heads="(cores.{i} heads.{i}[cores])",
        channels=rotary,
        sizes={
            "cores": CODEGEN_CORES,
            "heads": config.n_head // CODEGEN_CORES,
            "rotary": config.rotary_dim,
            "head_dim": head_dim - config.rotary_dim,
            "value_dim": head_dim,
        },
        symmetric=("cores", "heads", "head_dim", "value_dim"),
    )
    return _gpt(
        config,
        "transformer",
        embedding("wte"),
        layers(
            "h",
            config.n_layer,
            norm("ln_1"),
            linear("attn.qkv_proj", heads.by_head, "residual", bias=False),
            linear("attn.out_proj", "residual", heads.output, bias=False),
            ["attn.causal_mask?  1 1 positions positions"],
            mlp("mlp.fc_in", "mlp.fc_out", bias=True),
        ),
        norm("ln_f"),
        heads=heads,
        neurons=config.n_inner,
    )


def gpt_neox(config: PreTrainedConfig) -> PermutationSpec:
    """GPT-NeoX and Pythia with any of their heads."""
    return _neox(config, "gpt_neox", config.intermediate_size)


def gpt_neox_japanese(config: PreTrainedConfig) -> PermutationSpec:
    """GPT-NeoX Japanese with any of its heads."""
    return _neox(config, "gpt_neox_japanese", int(config.hidden_size * config.intermediate_multiple_size))


def _neox(config: PreTrainedConfig, root: str, neurons: int) -> PermutationSpec:
    head_dim = config.hidden_size // config.num_attention_heads
    heads = _partly_rotary_heads(config, rotary_channels(config.to_dict(), head_dim))
    return _gpt(
        config,
        root,
        embedding("embed_in"),
        layers(
            "layers",
            config.num_hidden_layers,
            norm("input_layernorm"),
            norm("post_attention_layernorm"),
            within(
                "attention",
                linear("query_key_value", heads.by_head, "residual"),
                linear("dense", "residual", heads.output),
                ["dense_bias?  residual"],
                OLD_BUFFERS,
            ),
            mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        norm("final_layer_norm"),
        heads=heads,
        neurons=neurons,
        output="embed_out",
    )


def gpt_bigcode(config: PreTrainedConfig) -> PermutationSpec:
    """GPT-BigCode, StarCoder and SantaCoder with any of their heads."""
    count = config.n_head
    heads = heads_of(count, 1 if config.multi_query else count, head_dim=config.n_embd // count, free_channels=True)
    return _gpt(
        config,
        "transformer",
        embedding("wte"),
        embedding("wpe", rows="positions"),
        layers(
            "h",
            config.n_layer,
            norm("ln_1"),
            linear("attn.c_attn", heads.by_head, "residual", bias=True),
            linear("attn.c_proj", "residual", heads.output, bias=True),
            norm("ln_2"),
            mlp("mlp.c_fc", "mlp.c_proj", bias=True),
        ),
        norm("ln_f"),
        heads=heads,
        neurons=config.n_inner,
    )


def openai_gpt(config: PreTrainedConfig) -> PermutationSpec:
    """The first GPT with any of its heads."""
    heads = _free_heads(config)
    return _gpt(
        config,
        "transformer",
        embedding("tokens_embed"),
        embedding("positions_embed", rows="positions"),
        ["position_ids?  positions"],
        layers(
            "h",
            config.n_layer,
            conv1d("attn.c_attn", heads.fused, "residual"),
            conv1d("attn.c_proj", "residual", heads.output),
            within("attn", OLD_BUFFERS),
            norm("ln_1"),
            conv1d("mlp.c_fc", "neurons.{i}", "residual"),
            conv1d("mlp.c_proj", "residual", "neurons.{i}"),
            norm("ln_2"),
        ),
        heads=heads,
    )


def ctrl(config: PreTrainedConfig) -> PermutationSpec:
    """CTRL with any of its heads."""
    heads = _free_heads(config)
    return _gpt(
        config,
        "transformer",
        embedding("w"),
        layers(
            "h",
            config.n_layer,
            within("multi_head_attention", attention("Wq", "Wk", "Wv", "dense", heads, bias=True, output_bias=True)),
            mlp("ffn.0", "ffn.2", bias=True),
            norm("layernorm1"),
            norm("layernorm2"),
        ),
        norm("layernorm"),
        heads=heads,
        neurons=config.dff,
        fixed=("residual",),  # the positions added to it are sines that no tensor holds
    )


def opt(config: PreTrainedConfig) -> PermutationSpec:
    """OPT with any of its heads."""
    heads = _free_heads(config)
    # Some sizes are embedded in a narrower space than the residual stream.
    narrow = config.word_embed_proj_dim != config.hidden_size
    outside = "embedding" if narrow else "residual"
    lines = [
        *within(
            "model.decoder",
            embedding("embed_tokens", axis=outside),
            embedding("embed_positions", rows="positions"),
            linear("project_in", "residual", "embedding", bias=False) if narrow else [],
            layers(
                "layers",
                config.num_hidden_layers,
                _optional(norm("self_attn_layer_norm")),
                within("self_attn", attention("q_proj", "k_proj", "v_proj", "out_proj", heads)),
                _optional(norm("final_layer_norm")),
                mlp("fc1", "fc2"),
            ),
            _optional(norm("final_layer_norm")),
            linear("project_out", "embedding", "residual", bias=False) if narrow else [],
        ),
        *(line for name in ("score", "qa_outputs") for line in head(name, into=outside)),
        *head("lm_head", into=outside, out="vocab"),
    ]
    return declare(
        config,
        lines,
        sizes={
            "vocab": config.vocab_size,
            "positions": None,
            "residual": config.hidden_size,
            "embedding": config.word_embed_proj_dim,
            "neurons": config.ffn_dim,
            "labels": None,
            **heads.sizes,
        },
        symmetric=occurring(("residual", "embedding", *heads.symmetric, "neurons"), lines),
        outputs=(outside,),
        prefix="model.",
    )


def _optional(lines: Iterable[str]) -> list[str]:
    return [line.replace(".weight  ", ".weight?  ") for line in lines]


def biogpt(config: PreTrainedConfig) -> PermutationSpec:
    """BioGPT with any of its heads."""
    heads = _free_heads(config)
    return _gpt(
        config,
        "biogpt",
        embedding("embed_tokens"),
        embedding("embed_positions", rows="positions"),
        _fairseq_layers(config.num_hidden_layers, heads),
        norm("layer_norm"),
        heads=heads,
        neurons=config.intermediate_size,
        output="output_projection",
    )


def xglm(config: PreTrainedConfig) -> PermutationSpec:
    """XGLM with any of its heads."""
    heads = _free_heads(config)
    return _gpt(
        config,
        "model",
        embedding("embed_tokens"),
        ["embed_positions.weights?  positions residual"],
        _fairseq_layers(config.num_layers, heads),
        norm("layer_norm"),
        heads=heads,
        neurons=config.ffn_dim,
        fixed=("residual",),  # the positions added to it are sines that no tensor holds
    )


def _fairseq_layers(count: int, heads: Heads) -> list[str]:
    return layers(
        "layers",
        count,
        norm("self_attn_layer_norm"),
        within("self_attn", attention("q_proj", "k_proj", "v_proj", "out_proj", heads, bias=True, output_bias=True)),
        norm("final_layer_norm"),
        mlp("fc1", "fc2", bias=True),
    )


def bloom(config: PreTrainedConfig) -> PermutationSpec:
    """BLOOM with any of its heads."""
    heads = _free_heads(config)
    return _gpt(
        config,
        "transformer",
        embedding("word_embeddings"),
        norm("word_embeddings_layernorm"),
        layers(
            "h",
            config.n_layer,
            norm("input_layernorm"),
            linear("self_attention.query_key_value", heads.by_head, "residual", bias=True),
            linear("self_attention.dense", "residual", heads.output, bias=True),
            norm("post_attention_layernorm"),
            mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=True),
        ),
        norm("ln_f"),
        heads=heads,
        fixed=("heads",),  # ALiBi gives each head a slope of its own
    )


def mpt(config: PreTrainedConfig) -> PermutationSpec:
    """MPT with any of its heads."""
    heads = _free_heads(config)
    return _gpt(
        config,
        "transformer",
        embedding("wte"),
        layers(
            "blocks",
            config.n_layers,
            norm("norm_1"),
            linear("attn.Wqkv", heads.fused, "residual"),
            linear("attn.out_proj", "residual", heads.output),
            norm("norm_2"),
            mlp("ffn.up_proj", "ffn.down_proj"),
        ),
        norm("norm_f"),
        heads=heads,
        fixed=("heads",),  # ALiBi gives each head a slope of its own
    )


def falcon(config: PreTrainedConfig) -> PermutationSpec:
    """Falcon with any of its heads, of the first or the second architecture."""
    count = config.num_attention_heads
    one_kv_head = config.multi_query and not config.new_decoder_architecture
    heads = heads_of(
        count,
        1 if one_kv_head else config.num_kv_heads if config.new_decoder_architecture else count,
        head_dim=config.hidden_size // count,
        free_channels=config.alibi,
    )
    return _gpt(
        config,
        "transformer",
        embedding("word_embeddings"),
        layers(
            "h",
            config.num_hidden_layers,
            *(_optional(norm(name)) for name in ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp")),
            linear("self_attention.query_key_value", heads.by_head, "residual"),
            linear("self_attention.dense", "residual", heads.output),
            ["self_attention.rotary_emb.inv_freq?  frequencies", "self_attention.maybe_rotary.inv_freq?  frequencies"],
            mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        norm("ln_f"),
        heads=heads,
        neurons=config.ffn_hidden_size,
        fixed=("heads", "kv", "q") if config.alibi else (),  # ALiBi gives each head a slope of its own
    )


def dbrx(config: PreTrainedConfig) -> PermutationSpec:
    """DBRX with any of its heads; all experts of a layer share one tensor."""
    heads = heads_of(config.n_heads, config.attn_config.kv_n_heads, head_dim=config.d_model // config.n_heads)
    return _gpt(
        config,
        "transformer",
        embedding("wte"),
        layers(
            "blocks",
            config.n_layers,
            within(
                "norm_attn_norm",
                norm("norm_1"),
                linear("attn.Wqkv", heads.fused, "residual", bias=False),
                linear("attn.out_proj", "residual", heads.output, bias=False),
                norm("norm_2"),
            ),
            linear("ffn.router.layer", "experts.{i}", "residual", bias=False),
            [
                f"ffn.experts.mlp.{name}  (experts.{{i}} neurons.{{i}}[experts])  residual"
                for name in ("w1", "v1", "w2")
            ],
        ),
        norm("norm_f"),
        heads=heads,
        neurons=config.ffn_config.ffn_hidden_size,
        experts=config.ffn_config.moe_num_experts,
    )
