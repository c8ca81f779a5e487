"""Alignment beyond permutations: logits stay, planted transforms are found, merges are ordinary checkpoints."""

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import hf_llfc
from hf_llfc import PermutationSpec
from hf_llfc.adapters.canonical_forms import FORMS, canonical_form
from hf_llfc.alignment import Parameters, Search, match_weights
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from hf_llfc.errors import LLFCError
from hf_llfc.symmetry.canonical import Canonical, CanonicalForm
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS
from tests.mlp_model import MLPConfig, MLPForImageClassification

DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "head_dim": 4,
    "pad_token_id": 0,
}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 3,
}
CHANNELS = {
    "num_channels": 1,
    "embedding_size": 8,
    "hidden_sizes": [8, 12],
    "depths": [1, 2],
    "layer_type": "basic",
    "num_labels": 3,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
CASES = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
    "gpt2 relu": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2, activation_function="relu")),
    "gpt2 classes": (transformers.GPT2ForSequenceClassification, transformers.GPT2Config(**GPT2, pad_token_id=0)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER)),
    "llama tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "llama biases": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER, attention_bias=True)),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**DECODER)),
    "granite": (transformers.GraniteForCausalLM, transformers.GraniteConfig(**DECODER)),
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig(**DECODER)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**DECODER)),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**DECODER)),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**IMAGE)),
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig(**IMAGE)),
    "resnet": (transformers.ResNetForImageClassification, transformers.ResNetConfig(**CHANNELS)),
    "resnet bottleneck": (
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig(**{**CHANNELS, "layer_type": "bottleneck", "hidden_sizes": [16, 32]}),
    ),
    "mlp": (MLPForImageClassification, MLPConfig(image_size=8, hidden_sizes=(12, 10), num_labels=3)),
}
OWN = {"mlp_classifier"}


def test_every_family_has_a_case():
    assert {config.model_type for _, config in CASES.values()} == {*FORMS, *OWN}


def made(case: str, seed: int = 0) -> PreTrainedModel:
    """A model whose gains and shifts are not those of initialisation."""
    model_class, config = CASES[case]
    config = copy.deepcopy(config)
    config.architectures = [model_class.__name__]
    torch.manual_seed(seed)
    model = model_class(config).double().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return model


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its tensors as a file holds them."""
    return dict(open_checkpoint(model).state_dict())


def canonical_state(form: CanonicalForm, state: dict[str, Tensor]) -> dict[str, Tensor]:
    canonical = Canonical(form, form.spec.bind({name: value.shape for name, value in state.items()}), state.__getitem__)
    return {name: canonical.canonical(name) for name in (*state, *canonical.added)}


def logits(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)).logits
        return model(input_ids=torch.randint(1, 40, (3, 12), generator=generator)).logits


@pytest.fixture
def all_in_float64(monkeypatch):
    """Some classes compute norms and rotary embeddings in float32 whatever their weights are in."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize("case", CASES)
def test_canonical_form_and_random_transforms_keep_the_logits(case, all_in_float64):
    model = made(case)
    expected = logits(model)
    form = canonical_form(model.config)
    state = canonical_state(form, stored(model))
    checkpoint = canonical_checkpoint(open_checkpoint(model), form)
    random = form.spec.random_alignment(torch.Generator().manual_seed(1))
    moved = random.apply(state)
    assert max(float((moved[name] - state[name]).abs().max()) for name in state) > 0.1
    for each in (state, moved):
        again = load_model(checkpoint, state_dict=each, dtype=torch.float64).eval()
        assert type(again) is type(model)
        found = logits(again)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-9
    back = random.inverse().apply(moved)
    assert max(float((back[name] - state[name]).abs().max()) for name in state) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_planted_transforms_are_found(case):
    model = made(case)
    form = canonical_form(model.config)
    state = canonical_state(form, stored(model))
    planted = form.spec.random_alignment(torch.Generator().manual_seed(2)).apply(state)
    pair = [Parameters.from_state_dict(form.spec, each) for each in (state, planted)]
    alignment = match_weights(*pair, search=Search(restarts=4))
    found = alignment.apply(planted)
    assert alignment.metadata["cosine_after"] > 1 - 1e-6
    assert max(float((found[name] - state[name]).abs().max()) for name in state) < 1e-5


def numbers(*shape: int, seed: int = 5) -> Tensor:
    """Far from 0, of both signs."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn + 0.5 * drawn.sign()


def along(vector: Tensor, dim: int, dims: int) -> Tensor:
    """A vector to multiply one dimension by."""
    return vector.reshape([-1 if place == dim else 1 for place in range(dims)])


def scale_neurons(state: dict[str, Tensor], up: str, down: str, scales: Tensor, transposed: bool = False) -> None:
    """Times s what writes them, divided by s what reads them."""
    rows, columns = (1, 0) if transposed else (0, 1)
    state[f"{up}.weight"] *= along(scales, rows if state[f"{up}.weight"].ndim > 1 else 0, state[f"{up}.weight"].ndim)
    if f"{up}.bias" in state:
        state[f"{up}.bias"] *= scales
    state[f"{down}.weight"] /= along(scales, columns, state[f"{down}.weight"].ndim)


def gated_scales(state: dict[str, Tensor]) -> None:
    for i in range(2):
        scale_neurons(state, f"model.layers.{i}.mlp.up_proj", f"model.layers.{i}.mlp.down_proj", numbers(24, seed=i))


def relu_scales(state: dict[str, Tensor]) -> None:
    for i in range(2):
        layer = f"transformer.h.{i}.mlp"
        scale_neurons(state, f"{layer}.c_fc", f"{layer}.c_proj", numbers(64, seed=i).abs(), transposed=True)


def relu_scales_of_an_mlp(state: dict[str, Tensor]) -> None:
    scale_neurons(state, "layers.0.dense", "layers.1.dense", numbers(12, seed=0).abs())
    scale_neurons(state, "layers.1.dense", "classifier", numbers(10, seed=1).abs())


def relu_scales_behind_batch_norm(state: dict[str, Tensor]) -> None:
    """Of channels inside a block, and of those that a shortcut shares."""
    layers = "resnet.encoder.stages.1.layers"
    scale_neurons(
        state, f"{layers}.1.layer.0.normalization", f"{layers}.1.layer.1.convolution", numbers(12, seed=0).abs()
    )
    shared = numbers(12, seed=1).abs()
    for place, name in enumerate(("0.shortcut", "0.layer.1", "1.layer.1")):
        reader = ("1.layer.0.convolution", None, None)[place]
        for kind in ("weight", "bias"):
            state[f"{layers}.{name}.normalization.{kind}"] *= shared
        if reader is not None:
            state[f"{layers}.{reader}.weight"] /= along(shared, 1, 4)
    state["classifier.1.weight"] /= shared


def invertible_values(state: dict[str, Tensor]) -> None:
    """One matrix for each of the key/value heads, whose two query heads read it."""
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        matrix = numbers(2, 4, 4, seed=i)
        values, output = state[f"{attention}.v_proj.weight"], state[f"{attention}.o_proj.weight"]
        values.copy_((matrix @ values.view(2, 4, 16)).view(8, 16))
        output.copy_(torch.einsum("rkqc,kcd->rkqd", output.view(16, 2, 2, 4), torch.linalg.inv(matrix)).flatten(1))


def complex_scales(state: dict[str, Tensor]) -> None:
    """(s·R, R/s) for queries and keys: a complex number for each pair of channels (c, c + 2) of a key/value head."""
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        number = torch.complex(numbers(2, 2, seed=i), numbers(2, 2, seed=i + 9))
        for name, factor in (("q_proj", number), ("k_proj", number / number.abs().square())):
            weight = state[f"{attention}.{name}.weight"]
            pairs = weight.view(2, -1, 2, 2, 16)  # key/value head, query head, half, pair, stream
            turned = torch.complex(pairs[:, :, 0], pairs[:, :, 1]) * factor[:, None, :, None]
            weight.copy_(torch.stack([turned.real, turned.imag], 2).reshape(weight.shape))


def invertible_heads(state: dict[str, Tensor]) -> None:
    """Queries and keys without a rotary embedding, and values and outputs, each head with matrices of its own."""
    for i in range(2):
        attention = f"transformer.h.{i}.attn"
        matrix, of_values = numbers(4, 4, 4, seed=i), numbers(4, 4, 4, seed=i + 9)
        for kind in ("weight", "bias"):
            fused = state[f"{attention}.c_attn.{kind}"]
            parts = fused.unflatten(-1, (3, 4, 4)).clone()
            for place, factor in enumerate((matrix, torch.linalg.inv(matrix).mT, of_values)):
                parts[..., place, :, :] = torch.einsum("...hc,hdc->...hd", parts[..., place, :, :], factor)
            fused.copy_(parts.reshape(fused.shape))
        output = state[f"{attention}.c_proj.weight"]
        inverse = torch.linalg.inv(of_values)
        output.copy_(torch.einsum("hcr,hcd->hdr", output.view(4, 4, 16), inverse).reshape(16, 16))


def gains_of_rms_norms(state: dict[str, Tensor]) -> None:
    readers = {"model.norm": ["lm_head"]}
    for i in range(2):
        layer = f"model.layers.{i}"
        readers[f"{layer}.input_layernorm"] = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        readers[f"{layer}.post_attention_layernorm"] = [f"{layer}.mlp.{name}_proj" for name in ("gate", "up")]
    for place, (norm, maps) in enumerate(readers.items()):
        gain = numbers(16, seed=place)
        state[f"{norm}.weight"] *= gain
        for name in maps:
            state[f"{name}.weight"] /= gain


def gains_of_layer_norms(state: dict[str, Tensor]) -> None:
    """Those inside the blocks: behind the last one is the tied embedding."""
    for i in range(2):
        for place, (norm, reader) in enumerate((("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc"))):
            gain = numbers(16, seed=2 * i + place)
            for kind in ("weight", "bias"):
                state[f"transformer.h.{i}.{norm}.{kind}"] *= gain
            state[f"transformer.h.{i}.{reader}.weight"] /= gain[:, None]


@pytest.mark.parametrize(
    ("case", "plant"),
    [
        ("llama", gated_scales),
        ("llama", invertible_values),
        ("llama", complex_scales),
        ("llama", gains_of_rms_norms),
        ("gpt2", invertible_heads),
        ("gpt2", gains_of_layer_norms),
        ("gpt2 relu", relu_scales),
        ("mlp", relu_scales_of_an_mlp),
        ("resnet", relu_scales_behind_batch_norm),
    ],
)
def test_transforms_that_are_not_orthogonal_are_found_in_the_checkpoint_as_it_is(case, plant, all_in_float64):
    """Planted in the original coordinates, with every permutation on top: heads, query heads, neurons, channels."""
    model = made(case)
    expected = logits(model)
    state = stored(model)
    planted = {name: value.clone() for name, value in state.items()}
    plant(planted)
    again = load_model(open_checkpoint(model), state_dict=planted, dtype=torch.float64).eval()
    assert float((logits(again) - expected).abs().max() / expected.abs().max()) < 1e-9
    planted = (
        PermutationSpec.from_config(model.config).random_alignment(torch.Generator().manual_seed(6)).apply(planted)
    )
    form = canonical_form(model.config)
    before, after = (canonical_state(form, each) for each in (state, planted))
    pair = [Parameters.from_state_dict(form.spec, each) for each in (before, after)]
    found = match_weights(*pair, search=Search(restarts=4)).apply(after)
    assert max(float((found[name] - before[name]).abs().max()) for name in before) < 1e-5


def test_every_group_of_every_kind_of_axis_is_among_what_is_planted():
    """So that the tests above say something of each."""
    planted = set()
    for case in CASES:
        spec = canonical_form(made(case).config).spec
        for axis, transform in spec.random_alignment(torch.Generator().manual_seed(2)).transforms.items():
            kind = axis.split(".")[0]
            if not transform.is_identity:
                planted.add((kind, spec.axes[axis].group))
            if case == "qwen3":
                assert kind not in ("phases", "head_dim"), "the norm of queries and keys has a gain on each channel"
    assert planted == {
        ("residual", "orthogonal"),
        ("residual", "orthogonal_fixing_ones"),
        ("value_dim", "orthogonal"),
        ("head_dim", "orthogonal"),
        ("phases", "phases"),
        ("signs", "orthogonal"),
        *((kind, "permutation") for kind in ("neurons", "heads", "kv", "q", "channels", "inner")),
    }


def test_circuits_that_share_a_map_are_balanced_together():
    model = made("mlp")
    state = canonical_state(canonical_form(model.config), stored(model))
    for into, out in (("layers.0.dense", "layers.1.dense"), ("layers.1.dense", "classifier")):
        writes = state[f"{into}.weight"].square().sum(1) + state[f"{into}.bias"].square()
        torch.testing.assert_close(writes, state[f"{out}.weight"].square().sum(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("case", "keys", "values", "output"),
    [
        (
            "gpt2",
            ("transformer.h.0.attn.c_attn.bias", slice(16, 32)),
            ("transformer.h.0.attn.c_attn.bias", slice(32, 48)),
            "transformer.h.0.attn.c_proj",
        ),
        (
            "vit",
            ("vit.encoder.layer.0.attention.attention.key.bias", slice(None)),
            ("vit.encoder.layer.0.attention.attention.value.bias", slice(None)),
            "vit.encoder.layer.0.attention.output.dense",
        ),
        (
            "llama biases",
            None,
            ("model.layers.0.self_attn.v_proj.bias", slice(None)),
            "model.layers.0.self_attn.o_proj",
        ),
    ],
)
def test_biases_that_attention_hides_are_taken_away(case, keys, values, output):
    model = made(case)
    form = canonical_form(model.config)
    state = stored(model)
    changed = {name: value.clone() for name, value in state.items()}
    shift = torch.randn(
        changed[values[0]][values[1]].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    changed[values[0]][values[1]] += shift
    weight = changed[f"{output}.weight"]
    of_heads = shift.view(-1, 4).repeat_interleave(weight.shape[1] // len(shift), 0).flatten()
    changed[f"{output}.bias"] -= of_heads @ weight if case == "gpt2" else weight @ of_heads
    if keys is not None:
        changed[keys[0]][keys[1]] += 1.0
    before, after = (canonical_state(form, each) for each in (state, changed))
    assert max(float((before[name] - after[name]).abs().max()) for name in state) < 1e-9
    assert not bool(after[values[0]][values[1]].any())


@pytest.mark.parametrize(
    ("case", "anchors"),
    [
        ("gpt2", {"lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"}),
        ("llama", {"lm_head.weight", "model.embed_tokens.weight"}),
        (
            "vit",
            {
                "classifier.weight",
                *(f"vit.embeddings.{each}" for each in ("cls_token", "position_embeddings")),
                "vit.embeddings.patch_embeddings.projection.weight",
            },
        ),
    ],
)
def test_anchors_are_what_holds_the_stream_beside_fixed_axes(case, anchors):
    model = made(case)
    form = canonical_form(model.config)
    state = canonical_state(form, stored(model))
    plain = Parameters.from_state_dict(form.spec, state)
    weighted = plain.with_anchors(16)
    for name, value in state.items():
        assert torch.equal(weighted.read(name), 4 * value if name in anchors else value)
    assert plain.with_anchors(1) is plain
    half = {name: value.to(torch.bfloat16) for name, value in state.items()}
    read = Parameters.from_state_dict(form.spec, half).with_anchors(3).read(sorted(anchors)[0])
    assert read.dtype == torch.float32


def test_anchors_count_as_often_as_said():
    form = canonical_form(made("llama").config)
    a, b = (canonical_state(form, stored(made("llama", seed))) for seed in (0, 1))
    pair = [Parameters.from_state_dict(form.spec, each).with_anchors(5.0) for each in (a, b)]
    alignment = match_weights(*pair)
    moved = alignment.apply(b)
    expected = sum(
        (5.0 if name in ("lm_head.weight", "model.embed_tokens.weight") else 1.0) * float((a[name] * moved[name]).sum())
        for name in a
        if not name.endswith("norm.weight")
    )
    assert alignment.metadata["objective_after"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("group", sorted(MATRIX_GROUPS))
def test_nearest_is_in_the_group_and_best(group):
    generator = torch.Generator().manual_seed(0)
    nearest, random = MATRIX_GROUPS[group].nearest, MATRIX_GROUPS[group].random
    gain = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    best = nearest(gain)
    assert float((best @ best.T - torch.eye(8)).abs().max()) < 1e-12
    value = float((gain * best).sum())
    others = [random(8, generator) for _ in range(200)]
    assert all(float((gain * other).sum()) < value for other in others)
    # A member is the nearest to itself, so that what `random` draws and what `nearest` returns are the same group.
    assert all(float((nearest(other) - other).abs().max()) < 1e-9 for other in others)


def test_fixing_ones_fixes_ones():
    group = MATRIX_GROUPS["orthogonal_fixing_ones"]
    best = group.nearest(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert float((best.sum(1) - 1).abs().max()) < 1e-12


@pytest.mark.parametrize("case", ["gpt2", "llama tied"])
def test_a_merge_is_an_ordinary_checkpoint(case, tmp_path):
    model = made(case).float()
    model.save_pretrained(tmp_path / "a")
    form = canonical_form(model.config)
    state = canonical_state(form, {name: value.double() for name, value in stored(model).items()})
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    other = type(model)(config)
    moved = form.spec.random_alignment(torch.Generator().manual_seed(3)).apply(state)
    other.load_state_dict({name: value.float() for name, value in moved.items()}, strict=False)
    if case == "llama tied":  # parents have to be of one config: both untied
        untied = type(model)(config)
        untied.load_state_dict({name: value.float() for name, value in state.items()})
        untied.save_pretrained(tmp_path / "a")
    if case == "gpt2":
        tied = type(model)(copy.deepcopy(model.config))
        tied.load_state_dict(made(case).state_dict())
        tied.save_pretrained(tmp_path / "b")
    else:
        other.save_pretrained(tmp_path / "b")
    result = hf_llfc.merge(
        [tmp_path / "a", tmp_path / "b"], out=tmp_path / "merged", align={"groups": "full", "restarts": 4}
    )
    merged = type(model).from_pretrained(result.folder, dtype=torch.float64).eval()
    expected = logits(type(model).from_pretrained(tmp_path / "a", dtype=torch.float64).eval())
    assert float((logits(merged) - expected).abs().max() / expected.abs().max()) < 1e-4
    assert "(all groups)" in result.alignments[0]["sentence"]


def test_anchors_are_those_of_the_options(tmp_path):
    for seed in (0, 1):
        made("llama", seed).float().save_pretrained(tmp_path / str(seed))

    def objective(**options):
        return hf_llfc.align(tmp_path / "1", to=tmp_path / "0", restarts=1, **options).metadata["objective_before"]

    without, with_anchors = objective(groups="full", anchors=1.0), objective(groups="full", anchors=2.0)
    assert objective(groups="full") == pytest.approx(without + 15 * (with_anchors - without), rel=1e-5)
    assert objective() == objective(anchors=1.0) != objective(anchors=16.0)
    with pytest.raises(LLFCError, match="anchors: a number above 0 is expected, found -1"):
        objective(anchors=-1.0)


def test_families_without_a_form_are_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    for name in ("a", "b"):
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / name)
    with pytest.raises(LLFCError, match="'bert' cannot be aligned by more than permutations"):
        hf_llfc.merge([tmp_path / "a", tmp_path / "b"], out=tmp_path / "merged", align={"groups": "full"})
    assert not (tmp_path / "merged").exists()
