"""Which families can be aligned by more than permutations, and how their checkpoints are folded for it.

The residual stream of a family that is listed here is read through norms only, before each block and before the head
(pre-norm). Where a norm's gain sits on the stream itself (BERT and other post-norm models, Gemma 2 and 3, OLMo 2) the
stream keeps its permutations, and so does that of a model that returns it as its features.

What an axis may be transformed by follows from the blocks:

| axis | group |
|---|---|
| residual stream | orthogonal; where the norms are LayerNorm, orthogonal fixing 1 |
| value channels of a head | orthogonal, balanced over every invertible matrix |
| query and key channels, no rotary embedding | the same as value channels |
| query and key channels, rotary embedding | a phase for each pair of channels, balanced over its scale |
| the same under a norm of queries and keys | none: the norm's gain sits on them |
| gated neurons | permutations, and a sign of what the gate multiplies, balanced over its scale |
| neurons of ReLU, channels of convolutions before ReLU | permutations, balanced over their scale |

In a convolution network with batch normalization it is that whose gain and shift carry the scale of a channel. What it
takes in has another scale, which its running variance knows but for a small constant: that one is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_llfc.adapters.registry import registered_form, spec_for
from hf_llfc.errors import SpecError
from hf_llfc.symmetry.canonical import (
    INVERTIBLE,
    PAIR_SCALES,
    SCALES,
    CanonicalForm,
    Circuit,
    HiddenBiases,
    Norm,
    Part,
)
from hf_llfc.symmetry.declarations import Axis, TensorSpec
from hf_llfc.symmetry.expressions import AxisUse, Concatenation, Expression, Product, axis_uses
from hf_llfc.symmetry.matrix_groups import ORTHOGONAL, ORTHOGONAL_FIXING_ONES, PHASES
from hf_llfc.symmetry.spec import PermutationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STREAM = "residual"

# What does not change with a positive factor but by that factor.
HOMOGENEOUS = ("relu", "leaky_relu")


@dataclass(frozen=True)
class Block:
    """One layer of a pre-norm transformer, by the declared names of its parts without their last `.weight`.

    Attributes:
        norms: Norm → the linear maps that read it.
        queries: (map, piece of its output) of the queries; None where queries and keys have a norm between.
        keys: Of the keys.
        values: Of the values.
        output: The map that reads the values.
        up: The map whose output is the neurons or, of gated ones, what the gate multiplies.
        down: The map that reads the neurons.
        scales: Whether the scale of a neuron is free.
        signs: Whether its sign is, too: σ(g)·(−u)·(−w) = σ(g)·u·w where a gate stands beside what is multiplied.
        attention_norms: Whether a norm of queries and keys forbids to transform their channels.
    """

    norms: Mapping[str, tuple[str, ...]]
    queries: tuple[str, int]
    keys: tuple[str, int]
    values: tuple[str, int]
    output: str
    up: str
    down: str
    scales: bool
    signs: bool = False
    attention_norms: bool = False


@dataclass(frozen=True)
class Network:
    """A pre-norm transformer, by declared names.

    Attributes:
        blocks: Its layers.
        writers: What writes to the residual stream beside the blocks: embeddings.
        last_norm: The norm before the heads.
        heads: What reads it.
        layer_norm: Whether its norms are LayerNorm, else RMSNorm.
        neutral: The stored value of a gain of 1.
        rotary: Whether queries and keys are turned by a rotary embedding, in pairs (c, c + n/2).
        tied: (output head, embedding) where they may share one tensor.
    """

    blocks: Sequence[Block]
    writers: tuple[str, ...]
    last_norm: str
    heads: tuple[str, ...]
    layer_norm: bool
    neutral: float = 1.0
    rotary: bool = False
    tied: tuple[str, str] | None = None


def canonical_form(config: PreTrainedConfig) -> CanonicalForm:
    """How checkpoints of a config are brought into canonical form, and what their axes may be transformed by then.

    Raises:
        SpecError: The family is not listed here, or an option of the config makes it another network.
    """
    own = registered_form(config.model_type)
    if own is not None:
        return own(config)
    form_of = FORMS.get(config.model_type)
    spec = spec_for(config)
    if form_of is None:
        raise SpecError(
            f"model type {config.model_type!r} cannot be aligned by more than permutations yet (known: "
            f"{', '.join(sorted(FORMS))}); use the groups `permutation`"
        )
    form = form_of(config, spec)
    if form is None:
        raise SpecError(
            f"this config of model type {config.model_type!r} cannot be aligned by more than permutations; use the "
            "groups `permutation`"
        )
    return form


def scaled(axis: str, writers: Sequence[str], readers: Sequence[str]) -> Circuit:
    """Neurons before a ReLU or leaky ReLU as a circuit: σ(s·x) = s·σ(x) for every s > 0.

    A canonical form of a network whose only other symmetry is the order of its neurons is
    `CanonicalForm(spec, circuits=[scaled(…), …])`, a circuit an axis.

    Args:
        axis: The axis of the neurons.
        writers: Declared names of what makes them: the weight and the bias of a linear map, the gain and the shift of a
            normalization. All else that the axis has (running statistics) keeps its scale.
        readers: Of the weights that read them, without anything between but the activation and what, like pooling,
            lets a positive factor through.
    """
    return Circuit(axis, SCALES, tuple(Part(name) for name in writers), tuple(Part(name) for name in readers))


def _form(spec: PermutationSpec, network: Network) -> CanonicalForm:
    circuits: list[Circuit] = []
    hidden: list[HiddenBiases] = []
    groups: dict[str, str] = {}
    channels: dict[str, AxisUse] = {}  # tensor → its phases, of each key/value head where there are several
    signs: dict[str, str] = {}  # neurons → the axis of their signs
    signed: set[str] = set()  # tensors that follow these
    for place, block in enumerate(network.blocks):
        values = _last_axis(spec, block.values)
        circuits.append(Circuit(values, INVERTIBLE, _parts(spec, *block.values), (Part(f"{block.output}.weight"),)))
        groups[values] = ORTHOGONAL
        sides = _parts(spec, *block.queries), _parts(spec, *block.keys)
        keys_are_seen = network.rotary or block.attention_norms
        biases = [
            None if seen or f"{name}.bias" not in spec.tensors else Part(f"{name}.bias", piece)
            for (name, piece), seen in ((block.keys, keys_are_seen), (block.values, False))
        ]
        if biases[1] is not None:
            hidden.append(HiddenBiases(biases[0], biases[1], f"{block.output}.weight", f"{block.output}.bias"))
        queries = _last_axis(spec, block.queries)
        if block.attention_norms:
            pass
        elif network.rotary:
            phases = f"phases.{place}"
            turned = AxisUse(phases, _head_axis(spec, block.keys))
            channels |= {part.tensor: turned for side in sides for part in side}
            circuits.append(Circuit(phases, PAIR_SCALES, *sides))
            groups[phases] = PHASES
        elif spec.axes[queries].symmetric:
            circuits.append(Circuit(queries, INVERTIBLE, *sides))
            groups[queries] = ORTHOGONAL
        if block.scales:
            neurons = _last_axis(spec, (block.up, 0))
            circuits.append(Circuit(neurons, SCALES, _parts(spec, block.up, 0), (Part(f"{block.down}.weight"),)))
            if block.signs:
                signs[neurons] = f"signs.{place}"
                signed |= {*(f"{block.up}.{kind}" for kind in KINDS), f"{block.down}.weight"}
    norms: list[Norm] = []
    writers: set[str] = set()
    if spec.axes[STREAM].symmetric:
        groups[STREAM] = ORTHOGONAL_FIXING_ONES if network.layer_norm else ORTHOGONAL
        readers = {name: maps for block in network.blocks for name, maps in block.norms.items()}
        readers[network.last_norm] = tuple(head for head in network.heads if f"{head}.weight" in spec.tensors)
        norms = [
            Norm(
                f"{name}.weight",
                f"{name}.bias" if f"{name}.bias" in spec.tensors else None,
                tuple(f"{reader}.weight" for reader in maps),
                network.neutral,
            )
            for name, maps in readers.items()
        ]
        blocks = [f"{name}.{kind}" for block in network.blocks for name in (block.output, block.down) for kind in KINDS]
        writers = {*network.writers, *blocks} & spec.tensors.keys()
    gains = {norm.gain for norm in norms}
    declarations = tuple(
        _with_gain(each) if each.name in gains else _with_phases(each, channels.get(each.name))
        for each in spec.declarations
    )
    axes = _axes(spec, declarations, groups)
    axes |= {name: Axis(name, 1, True, neurons, ORTHOGONAL) for neurons, name in signs.items()}
    declarations = tuple(_with_signs(each, signs) if each.name in signed else each for each in declarations)
    return CanonicalForm(
        replace(spec, declarations=declarations, axes=axes),
        tuple(norms),
        frozenset(writers),
        tuple(hidden),
        tuple(circuits),
        centred=network.layer_norm and bool(norms),
        tied=network.tied if norms else None,
    )


KINDS = ("weight", "bias")


def _parts(spec: PermutationSpec, name: str, piece: int) -> tuple[Part, ...]:
    """A piece of a map's weight, and of its bias if it may have one."""
    return tuple(Part(f"{name}.{kind}", piece) for kind in KINDS if f"{name}.{kind}" in spec.tensors)


def _of_output(spec: PermutationSpec, output: tuple[str, int]) -> Expression:
    """A piece of what a map gives out."""
    name, piece = output
    dimensions = spec.tensors[f"{name}.weight"].dimensions
    of_output = next(
        each for each in dimensions if not (isinstance(each, AxisUse) and each.axis == STREAM) or len(dimensions) == 1
    )
    return of_output.parts[piece] if isinstance(of_output, Concatenation) else of_output


def _last_axis(spec: PermutationSpec, output: tuple[str, int]) -> str:
    """The innermost axis of a piece of what a map gives out."""
    return list(axis_uses(_of_output(spec, output)))[-1].axis


def _with_gain(tensor: TensorSpec) -> TensorSpec:
    """A folded gain stays 1 wherever the stream goes."""
    return replace(tensor, dimensions=(AxisUse("gain"),))


def _head_axis(spec: PermutationSpec, keys: tuple[str, int]) -> str | None:
    """The axis of the key/value heads; None where there is one."""
    root = next(axis_uses(_of_output(spec, keys))).axis
    return root if root != _last_axis(spec, keys) else None


def _with_phases(tensor: TensorSpec, phases: AxisUse | None) -> TensorSpec:
    """A projection whose channels turn in pairs, those of each key and of the queries that meet it alike."""
    if phases is None:
        return tensor

    def turned(dimension: Expression) -> Expression:
        if isinstance(dimension, Product):
            return Product((*dimension.factors[:-1], phases))
        if (isinstance(dimension, AxisUse) and dimension.axis == "rotary") or dimension == AxisUse("head_dim"):
            return phases
        return dimension

    return replace(tensor, dimensions=tuple(turned(each) for each in tensor.dimensions))


def _with_signs(tensor: TensorSpec, signs: Mapping[str, str]) -> TensorSpec:
    """A map whose neurons have signs of their own: a dependent axis of one entry."""

    def signed(dimension: Expression) -> Expression:
        if isinstance(dimension, AxisUse) and dimension.axis in signs:
            return Product((dimension, AxisUse(signs[dimension.axis], dimension.axis)))
        return dimension

    return replace(tensor, dimensions=tuple(signed(each) for each in tensor.dimensions))


def _axes(spec: PermutationSpec, declarations: Iterable[TensorSpec], groups: Mapping[str, str]) -> dict[str, Axis]:
    """The axes of the spec with their groups, and those that are new."""
    axes = {name: replace(axis, group=groups.get(name, axis.group)) for name, axis in spec.axes.items()}
    for tensor in declarations:
        for use, size in zip(tensor.axes, _sizes_of(spec, tensor), strict=True):
            if use.axis not in axes:
                axes[use.axis] = Axis(
                    use.axis, size, use.axis in groups, use.parent, groups.get(use.axis, "permutation")
                )
    return axes


def _sizes_of(spec: PermutationSpec, tensor: TensorSpec) -> list[int | None]:
    """The size of every axis of a tensor, of new ones as in the tensor it was."""
    before = spec.tensors[tensor.name]
    return [spec.axes[use.axis].size for use in before.axes]


def _is_tied(config: PreTrainedConfig) -> bool:
    """Whether the class has an output head, and that is the embedding."""
    heads = ("LMHeadModel", "ForCausalLM", "DoubleHeadsModel")
    has_head = any(name.endswith(heads) for name in config.architectures or heads)
    return has_head and bool(config.to_dict().get("tie_word_embeddings"))


def _gpt2(config: PreTrainedConfig) -> Network | None:
    if config.add_cross_attention:
        return None
    blocks = []
    for i in range(config.n_layer):
        layer = f"transformer.h.{i}"
        attention, up, down = f"{layer}.attn.c_attn", f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj"
        blocks.append(
            Block(
                {f"{layer}.ln_1": (attention,), f"{layer}.ln_2": (up,)},
                (attention, 0),
                (attention, 1),
                (attention, 2),
                f"{layer}.attn.c_proj",
                up,
                down,
                config.activation_function in HOMOGENEOUS,
            )
        )
    return Network(
        blocks,
        ("transformer.wte.weight", "transformer.wpe.weight"),
        "transformer.ln_f",
        ("lm_head", "score", "classifier", "qa_outputs", "multiple_choice_head.summary"),
        layer_norm=True,
        tied=("lm_head.weight", "transformer.wte.weight") if _is_tied(config) else None,
    )


def _vit(config: PreTrainedConfig) -> Network:
    prefix = config.model_type
    blocks = []
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}.encoder.layer.{i}"
        queries, keys, values = (f"{layer}.attention.attention.{name}" for name in ("query", "key", "value"))
        up = f"{layer}.intermediate.dense"
        blocks.append(
            Block(
                {f"{layer}.layernorm_before": (queries, keys, values), f"{layer}.layernorm_after": (up,)},
                (queries, 0),
                (keys, 0),
                (values, 0),
                f"{layer}.attention.output.dense",
                up,
                f"{layer}.output.dense",
                config.hidden_act in HOMOGENEOUS,
            )
        )
    tokens = ("cls_token", "distillation_token", "mask_token", "position_embeddings")
    patches = "patch_embeddings.projection"
    return Network(
        blocks,
        tuple(f"{prefix}.embeddings.{name}" for name in (*tokens, f"{patches}.weight", f"{patches}.bias")),
        f"{prefix}.layernorm",
        ("classifier", "cls_classifier", "distillation_classifier", "decoder.0", f"{prefix}.pooler.dense"),
        layer_norm=True,
    )


def _llama(config: PreTrainedConfig) -> Network | None:
    blocks = []
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        queries, keys, values_map = (f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v"))
        gate, up, down = (f"{layer}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        blocks.append(
            Block(
                {
                    f"{layer}.input_layernorm": (queries, keys, values_map),
                    f"{layer}.post_attention_layernorm": (gate, up),
                },
                (queries, 0),
                (keys, 0),
                (values_map, 0),
                f"{layer}.self_attn.o_proj",
                up,
                down,
                scales=True,
                signs=True,
                attention_norms=config.model_type in WITH_ATTENTION_NORMS,
            )
        )
    return Network(
        blocks,
        ("model.embed_tokens.weight",),
        "model.norm",
        ("lm_head", "score", "qa_outputs"),
        layer_norm=False,
        neutral=0.0 if config.model_type == "gemma" else 1.0,
        rotary=True,
        tied=("lm_head.weight", "model.embed_tokens.weight") if _is_tied(config) else None,
    )


WITH_ATTENTION_NORMS = ("qwen3",)


def _of_network(
    network_of: Callable[[PreTrainedConfig], Network | None],
) -> Callable[[PreTrainedConfig, PermutationSpec], CanonicalForm | None]:
    def form_of(config: PreTrainedConfig, spec: PermutationSpec) -> CanonicalForm | None:
        network = network_of(config)
        return None if network is None else _form(spec, network)

    return form_of


def _resnet(config: PreTrainedConfig, spec: PermutationSpec) -> CanonicalForm | None:
    """Every channel is written by batch normalizations, summed at shortcuts, and read behind a ReLU."""
    if config.hidden_act not in HOMOGENEOUS:
        return None
    circuits = []
    for axis in spec.symmetric_axes:
        use = AxisUse(axis)
        vectors = [each.name for each in spec.declarations if each.dimensions == (use,)]
        readers = [each.name for each in spec.declarations if len(each.dimensions) > 1 and each.dimensions[1] == use]
        circuits.append(scaled(axis, [name for name in vectors if name.endswith((".weight", ".bias"))], readers))
    return CanonicalForm(spec, circuits=tuple(circuits))


FORMS: dict[str, Callable[[PreTrainedConfig, PermutationSpec], CanonicalForm | None]] = {
    "deit": _of_network(_vit),
    "gemma": _of_network(_llama),
    "gpt2": _of_network(_gpt2),
    "granite": _of_network(_llama),
    "llama": _of_network(_llama),
    "mistral": _of_network(_llama),
    "qwen2": _of_network(_llama),
    "qwen3": _of_network(_llama),
    "resnet": _resnet,
    "vit": _of_network(_vit),
}
