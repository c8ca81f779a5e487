"""Families made of others: renamed axes, parts, names that begin differently."""

import pytest
import torch
import transformers
from transformers import LlavaConfig, PreTrainedModel

from hf_llfc import PermutationSpec
from hf_llfc.adapters.compose import occurring, only_if, part_of, renamed
from tests.tiny_models import randomise, tiny_config

VISION = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}


def test_axes_are_renamed_with_their_indices_and_dependents():
    lines = ["a.residual.weight?  (heads.0 q.0[heads] head_dim) residual", "b.<experts.3>.weight  neurons.3[experts]"]
    assert renamed(lines, residual="(groups channels[groups])", heads="cross_heads", experts="e") == [
        "a.residual.weight?  (cross_heads.0 q.0[cross_heads] head_dim) (groups channels[groups])",
        "b.<e.3>.weight  neurons.3[e]",
    ]


def test_conditions_keep_their_names():
    assert renamed(["a  residual  if residual.weight"], residual="other") == ["a  other  if residual.weight"]
    assert only_if("x.weight", ["a  residual"], ["b?  1"]) == ["a  residual  if x.weight", "b?  1  if x.weight"]


def test_axes_that_occur():
    assert occurring(("residual", "heads", "a", "0"), ["a.weight  (heads.0 2) 3", "b  vocab"]) == ("heads",)


def test_a_part_has_the_tensors_below_the_head_with_axes_of_their_own():
    config = tiny_config("gpt2")
    part = part_of(config, "decoder.inner", axes="decoder_", shared={"residual": "stream"}, heads={"lm_head": "out"})
    assert "decoder.inner.wte.weight  decoder_vocab  stream" in part.lines
    assert "out.weight?  decoder_vocab  stream" in part.lines
    assert not any("score" in line for line in part.lines)
    assert part.sizes["stream"] == config.n_embd
    assert part.sizes["decoder_heads.1"] == config.n_head
    assert "stream" in part.symmetric and "decoder_value_dim.0" in part.symmetric
    alone = PermutationSpec.from_config(config)
    assert len(part.symmetric) == len(alone.symmetric_axes)


@pytest.fixture(scope="module")
def llava() -> PreTrainedModel:
    text = tiny_config("llama")
    text.architectures = ["LlamaModel"]  # what is returned alone does not fix the axes of the part
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=4)
    model = transformers.LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    randomise(model, torch.Generator().manual_seed(0))
    return model


def test_the_residual_stream_of_a_part_moves(llava: PreTrainedModel):
    assert "residual" in PermutationSpec.from_config(llava.config).symmetric_axes


def test_names_of_older_checkpoints_are_the_same_tensors(llava: PreTrainedModel, tmp_path):
    llava.save_pretrained(tmp_path)
    spec = PermutationSpec.from_config(LlavaConfig.from_pretrained(tmp_path))
    alignment = spec.random_alignment(torch.Generator().manual_seed(1))
    state = llava.state_dict()

    def older(name: str) -> str:
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
        name = name.replace("model.language_model.", "language_model.model.")
        return "language_model.lm_head.weight" if name == "lm_head.weight" else name

    moved = alignment.apply({older(name): tensor for name, tensor in state.items()})
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in moved
    expected = alignment.apply(state)
    assert all(torch.equal(moved[older(name)], expected[name]) for name in state)


def test_a_fused_tensor_on_disk_binds_its_parts_in_memory(tmp_path):
    config = transformers.Dinov2Config(**VISION, image_size=16, patch_size=4, use_swiglu_ffn=True)
    model = transformers.Dinov2Model(config)
    randomise(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    spec = PermutationSpec.from_config(transformers.Dinov2Config.from_pretrained(tmp_path))
    state = model.state_dict()
    binding = spec.bind({name: tensor.shape for name, tensor in state.items()})
    gate, up = (binding.tensors[f"encoder.layer.0.mlp.{part}_proj.weight"].spec for part in ("gate", "up"))
    assert gate.expression == up.expression == "neurons.0  residual"
