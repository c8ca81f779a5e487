import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file

from hf_llfc import PermutationSpec
from hf_llfc.adapters import spec_for
from hf_llfc.adapters.layouts import in_memory_layout
from hf_llfc.alignment import Parameters, match_activations, match_weights
from hf_llfc.errors import SpecError
from hf_llfc.symmetry import TensorSpec, parse
from tests.mlp_model import MLPConfig, MLPForImageClassification
from tests.tiny_models import CONFIGS, tiny_config, tiny_model


class TestOutputsOfModelsWithoutAHead:
    @pytest.mark.parametrize(
        ("family", "architectures", "fixed"),
        [
            ("bert", ["BertModel"], {"residual", "pooled"}),
            ("bert", ["BertForMaskedLM"], set()),
            ("bert", ["BertLMHeadModel"], set()),
            ("bert", ["BertModel", "BertForMaskedLM"], set()),
            ("bert", [], set()),
            ("bert", None, set()),
            ("gpt2", ["GPT2LMHeadModel"], set()),
            ("gpt2", ["GPT2DoubleHeadsModel"], set()),
            ("gpt2", ["GPT2Model"], {"residual"}),
            ("roberta", ["RobertaModel"], {"residual", "pooled"}),
            ("mixtral", ["MixtralModel"], {"residual"}),
            ("resnet-basic", ["ResNetModel"], {"channels.2"}),
            ("resnet-basic", ["ResNetBackbone"], {"channels.stem", "channels.0", "channels.1", "channels.2"}),
        ],
    )
    def test_they_stay(self, family, architectures, fixed):
        config = tiny_config(family)
        free = set(spec_for(config).symmetric_axes)
        config.architectures = architectures
        assert free - set(spec_for(config).symmetric_axes) == fixed


class TestSizes:
    @pytest.mark.parametrize(
        ("changes", "axes"),
        [
            ({}, {"kv.0": 2, "q.0": 3, "head_dim": 8, "residual": 24, "neurons.0": 40}),
            ({"num_key_value_heads": 6}, {"heads.0": 6, "head_dim": 8}),
            ({"num_key_value_heads": None}, {"heads.0": 6}),
            ({"num_key_value_heads": 1}, {"q.0": 6}),
            ({"head_dim": None}, {"head_dim": 4}),
        ],
    )
    def test_heads_of_a_decoder(self, changes, axes):
        config = tiny_config("llama")
        config = type(config)(**{**config.to_dict(), **changes})
        spec = spec_for(config)
        assert {name: spec.axes[name].size for name in axes} == axes
        assert ("heads.0" in spec.axes) != ("q.0" in spec.axes)

    @pytest.mark.parametrize(("family", "heads"), [("bert", 5), ("llama", 4)])
    def test_heads_that_do_not_divide_the_width_are_found_at_the_tensor(self, family, heads):
        config = tiny_config(family)
        shapes = shapes_of(spec_for(config))
        config.num_attention_heads = heads
        with pytest.raises(SpecError, match=r"(query|q_proj)\.weight: shape \[.*\] found, .* expected from the config"):
            spec_for(config).bind(shapes)


def shapes_of(spec: PermutationSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that no checkpoint may lack."""
    sizes = {name: axis.size for name, axis in spec.axes.items()}
    required = [tensor for tensor in spec.declarations if not tensor.optional]
    return {tensor.name: tensor.shape(sizes) for tensor in required}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_spec_travels_between_processes(family):
    spec = spec_for(tiny_config(family))
    copied = pickle.loads(pickle.dumps(spec))
    assert copied == spec
    assert copied.other_layouts(copied) == spec.other_layouts(spec)


class TestLayoutInMemory:
    def layout(self, family: str) -> dict[str, TensorSpec]:
        config = tiny_config(family)
        return {tensor.name: tensor for tensor in in_memory_layout(config, spec_for(config))}

    def test_experts_are_fused(self):
        layout = self.layout("mixtral")
        fused = layout["model.layers.1.mlp.experts.gate_up_proj"]
        assert fused.dimensions == parse("experts.1 neurons.1[experts] + neurons.1[experts] residual")
        names = {f"model.layers.1.block_sparse_moe.experts.{expert}.w{n}.weight" for expert in range(5) for n in (1, 3)}
        assert set(fused.covers) == names
        down = layout["model.layers.1.mlp.experts.down_proj"]
        assert down.dimensions == parse("experts.1 residual neurons.1[experts]")
        assert layout["model.layers.0.mlp.gate.weight"].dimensions == parse("experts.0 residual")

    def test_a_covered_tensor_that_is_missing_is_missed(self):
        config = tiny_config("mixtral")
        spec = spec_for(config)
        shapes = {name: tensor.shape for name, tensor in tiny_model("mixtral", "causal-lm").state_dict().items()}
        spec.bind(shapes)
        del shapes["model.layers.1.mlp.experts.gate_up_proj"]
        with pytest.raises(SpecError, match=r"layers\.1\.block_sparse_moe\.experts\.0\.w1\.weight: missing") as error:
            spec.bind(shapes)
        assert "w2" not in str(error.value) and "layers.0" not in str(error.value)

    def test_renamed_tensors_keep_their_axes(self):
        layout = self.layout("vit")
        assert layout["vit.layers.1.mlp.fc1.weight"].dimensions == parse("neurons.1 residual")
        assert all(len(tensor.covers) == 1 and tensor.optional for tensor in layout.values())

    @pytest.mark.parametrize("family", ["llama", "gpt2", "resnet-basic"])
    def test_most_families_have_one_layout(self, family):
        assert self.layout(family) == {}


class TestAnArchitectureOfOnesOwn:
    """`tests.mlp_model` registers a class that transformers does not know, and its adapter."""

    @pytest.fixture
    def model(self) -> MLPForImageClassification:
        torch.manual_seed(0)
        config = MLPConfig(image_size=4, num_channels=2, hidden_sizes=(12, 9, 7), num_labels=3)
        model = MLPForImageClassification(config).double().eval()
        for layer in model.layers:
            layer.dense.bias.data += 1  # no unit is dead on the images below
        return model

    def test_it_is_declared_moved_and_matched_like_any_other(self, model, tmp_path, generator):
        model.save_pretrained(tmp_path)
        spec = PermutationSpec.from_config(MLPConfig.from_pretrained(tmp_path))
        assert spec.symmetric_axes == ("neurons.0", "neurons.1", "neurons.2")
        planted = spec.random_alignment(generator)
        state = load_file(tmp_path / "model.safetensors")
        moved = copy.deepcopy(model)
        moved.load_state_dict(planted.apply(state))
        images = torch.randn(64, 2, 4, 4, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            before, after = model(images).logits, moved(images).logits
        assert float((before - after).abs().max()) <= 1e-9 * float(before.abs().max())
        by_weights = match_weights(*(Parameters.from_state_dict(spec, each.state_dict()) for each in (model, moved)))
        by_activations = match_activations(model, moved, [{"pixel_values": images}], spec)
        assert planted.then(by_weights).is_identity and planted.then(by_activations).is_identity

    def test_a_tensor_that_its_adapter_forgot_is_named(self, model):
        spec = PermutationSpec.from_config(model.config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        with pytest.raises(SpecError, match=r"gate\.weight: not declared"):
            spec.bind({**shapes, "gate.weight": torch.Size([3])})
