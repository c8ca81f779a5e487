"""wav2vec 2.0 and the speech encoders of its layout: convolutions over the waveform, then a transformer.

Positions come from a convolution in groups that is added to the residual stream. Its channels therefore move only as
that convolution's do: whole groups, and channels inside their group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import attention, head, heads_of, layer_norm, layers, linear, mlp, optional_norm, within
from hf_llfc.adapters.compose import occurring, renamed
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec

GROUPED = "(groups channels[groups])"
PREFIXES = {"data2vec-audio": "data2vec_audio", "hubert": "hubert", "wav2vec2": "wav2vec2", "wavlm": "wavlm"}

# Weight normalisation was stored under other names.
OLD_ENDINGS = {
    "conv.weight_g": "conv.parametrizations.weight.original0",
    "conv.weight_v": "conv.parametrizations.weight.original1",
}


def wav2vec2(config: Any) -> PermutationSpec:
    """wav2vec 2.0, HuBERT, WavLM and data2vec for audio with any of their heads."""
    options = config.to_dict()
    width, prefix = config.hidden_size, PREFIXES[config.model_type]
    # WavLM gates the bias of a head by the part of the residual stream that has its number: neither may move.
    gated = config.model_type == "wavlm"
    pretrains = config.model_type == "wav2vec2"
    adapted = bool(options.get("add_adapter"))
    heads = heads_of(config.num_attention_heads, head_dim=width // config.num_attention_heads, free_channels=True)
    output = f"adapter.{config.num_adapter_layers - 1}" if adapted else "residual"
    # An index after a dot would be taken for that of `groups` too.
    inner_positions = [f"position_{layer}" for layer in range(config.num_conv_pos_embeddings - 1)]
    layer = [
        *attention(
            ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"),
            heads,
            bias=True,
            output_bias=True,
        ),
        *layer_norm("layer_norm"),
        *mlp("feed_forward.intermediate_dense", "feed_forward.output_dense", bias=True),
        *layer_norm("final_layer_norm"),
        *(_bottleneck() if options.get("adapter_attn_dim") else ()),
        *(_gate() if gated else ()),
    ]
    blocks = [
        *within(
            prefix,
            ["masked_spec_embed?  residual"],
            _feature_extractor(len(config.conv_dim)),
            optional_norm("feature_projection.layer_norm", "features"),
            linear("feature_projection.projection", "residual", "features", bias=True),
            _positions(config),
            layer_norm("encoder.layer_norm"),
            layers("encoder.layers", config.num_hidden_layers, layer),
            _adapter(config.num_adapter_layers, config.output_hidden_size != width) if adapted else [],
        ),
        *_heads(len(options.get("tdnn_dim", ())), output),
        *(_pretraining(output) if pretrains else ()),
    ]
    tdnn = options.get("tdnn_dim", ())
    movable = ("features", "filters", "groups", "channels", "neurons", "bottleneck", "projection", "tdnn", "adapter")
    symmetric = [*movable, *inner_positions, *heads.symmetric, "codebooks", "entries", "code"]
    if gated:
        symmetric = [axis for axis in symmetric if axis != "heads"]
    else:
        blocks = renamed(blocks, residual=GROUPED)
    groups = config.num_conv_pos_embedding_groups
    unknown = ("head", "kernel", "buckets", "labels", "projected", "all_layers", "xvector")
    return declare(
        config,
        blocks,
        sizes={
            "vocab": config.vocab_size,
            **dict.fromkeys(unknown, None),
            **{f"filters.{layer}": size for layer, size in enumerate(config.conv_dim)},
            "features": config.conv_dim[-1],
            "residual": width,
            "groups": groups,
            **dict.fromkeys(("channels", *inner_positions), width // groups),
            **heads.sizes,
            "neurons": config.intermediate_size,
            "bottleneck": options.get("adapter_attn_dim"),
            "adapter": options.get("output_hidden_size"),
            "projection": config.classifier_proj_size,
            **(
                {
                    "codebooks": config.num_codevector_groups,
                    "entries": config.num_codevectors_per_group,
                    "code": config.codevector_dim // config.num_codevector_groups,
                }
                if pretrains
                else {}
            ),
            **{f"tdnn.{layer}": size for layer, size in enumerate(tdnn)},
            "tdnn.in": tdnn[0] if tdnn else None,
            **{f"window.{layer}": size for layer, size in enumerate(options.get("tdnn_kernel", ()))},
        },
        symmetric=occurring(symmetric, blocks),
        outputs=("features", "groups", "channels", "adapter"),
        prefix=f"{prefix}.",
        old_endings=OLD_ENDINGS,
    )


def _feature_extractor(depth: int) -> list[str]:
    lines = []
    for layer in range(depth):
        name, into = f"feature_extractor.conv_layers.{layer}", "1" if layer == 0 else f"filters.{layer - 1}"
        out = "features" if layer == depth - 1 else f"filters.{layer}"
        lines += [
            f"{name}.conv.weight  {out} {into} kernel.{layer}",
            f"{name}.conv.bias?  {out}",
            *optional_norm(f"{name}.layer_norm", out),
        ]
    return lines


def _positions(config: Any) -> list[str]:
    """The convolution of positions, in groups; one with normalised weights, or several in a row."""
    name = "encoder.pos_conv_embed"
    into = str(config.hidden_size // config.num_conv_pos_embedding_groups)
    if config.model_type != "wavlm":
        into = "channels[groups]"
    if config.model_type == "data2vec-audio":
        lines = []
        for layer in range(config.num_conv_pos_embeddings):
            out = "residual" if layer == config.num_conv_pos_embeddings - 1 else f"(groups position_{layer}[groups])"
            lines += [
                f"{name}.layers.{layer}.conv.weight  {out} {into} kernel.positions",
                f"{name}.layers.{layer}.conv.bias  {out}",
            ]
            into = f"position_{layer}[groups]"
        return lines
    weight = f"{name}.conv.parametrizations.weight"
    return [
        f"{weight}.original0?  1 1 kernel.positions",
        f"{weight}.original1?  residual {into} kernel.positions",
        f"{name}.conv.weight?  residual {into} kernel.positions",
        f"{name}.conv.bias  residual",
        *optional_norm(f"{name}.batch_norm"),
        f"{name}.batch_norm.running_mean?~  residual",
        f"{name}.batch_norm.running_var?~  residual",
        f"{name}.batch_norm.num_batches_tracked?~",
    ]


def _bottleneck() -> list[str]:
    return [
        *layer_norm("adapter_layer.norm"),
        *linear("adapter_layer.linear_1", "bottleneck.{i}", "residual", bias=True),
        *linear("adapter_layer.linear_2", "residual", "bottleneck.{i}", bias=True),
    ]


def _gate() -> list[str]:
    return [
        "attention.gru_rel_pos_const  1 heads.{i} 1 1",
        "attention.gru_rel_pos_linear.weight  8 head",
        "attention.gru_rel_pos_linear.bias  8",
        "attention.rel_attn_embed.weight?  buckets heads.{i}",  # of layer 0, for all layers
    ]


def _adapter(depth: int, projects: bool) -> list[str]:
    """Strided convolutions after the transformer; each gives channels and their gates."""
    lines, into = [], "residual"
    if projects:
        into = "adapter.in"
        lines = [*linear("adapter.proj", into, "residual", bias=True), *layer_norm("adapter.proj_layer_norm", into)]
    for layer in range(depth):
        out = f"adapter.{layer}"
        lines += [
            f"adapter.layers.{layer}.conv.weight  {out} + {out}  {into}  kernel.adapter",
            f"adapter.layers.{layer}.conv.bias  {out} + {out}",
        ]
        into = out
    return lines


def _pretraining(output: str) -> list[str]:
    """What is compared stays put; codebooks move, entries and channels inside their codebook."""
    return [
        *linear("project_hid", "projected", output, optional=True),
        *linear("project_q", "projected", "(codebooks code[codebooks])", optional=True),
        "quantizer.codevectors?  1 (codebooks entries[codebooks]) code[codebooks]",
        *linear("quantizer.weight_proj", "(codebooks entries[codebooks])", "features", optional=True),
    ]


def _heads(tdnn_layers: int, output: str) -> list[str]:
    """Heads for transcription, classification and speaker vectors; vectors that are compared stay put."""
    vectors = "objective.weight"
    lines = [
        *head("lm_head", into=output, out="vocab"),
        "layer_weights?  all_layers",
        *(f"{line}  unless {vectors}" for line in linear("projector", "projection", "residual", optional=True)),
        *(f"{line}  unless projector.weight" for line in head("classifier")),
        *(f"{line}  if projector.weight" for line in head("classifier", into="projection")),
    ]
    if tdnn_layers:
        into, last = "tdnn.in", f"tdnn.{tdnn_layers - 1}"
        lines += [f"{line}  if {vectors}" for line in linear("projector", into, "residual", optional=True)]
        for layer in range(tdnn_layers):
            lines += linear(f"tdnn.{layer}.kernel", f"tdnn.{layer}", f"(window.{layer} {into})", optional=True)
            into = f"tdnn.{layer}"
        lines += [
            *linear("feature_extractor", "xvector", f"{last} + {last}", optional=True),
            *(f"{line}  if {vectors}" for line in linear("classifier", "xvector", "xvector", optional=True)),
            f"{vectors}?  xvector labels",
        ]
    return lines
