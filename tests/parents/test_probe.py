"""A model that is moved along what is no symmetry of it is refused before anything is written, and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import hf_llfc
from hf_llfc import PermutationSpec
from hf_llfc.adapters.canonical_forms import canonical_form
from hf_llfc.adapters.derived.inputs import sample_inputs
from hf_llfc.adapters.derived.spec import model_with_random_weights
from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.adapters.registry import FAMILIES
from hf_llfc.checkpoints import Checkpoint, open_checkpoint
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from hf_llfc.cli import main
from hf_llfc.errors import AlignmentError
from hf_llfc.parents import probe as probing
from hf_llfc.parents import specs
from hf_llfc.parents.probe import NOISE, probe
from hf_llfc.pipeline.single_stages import write_aligned
from hf_llfc.recipe import load_recipe
from tests.properties import test_wrong_families, test_wrong_specs
from tests.properties.test_families import config_of
from tests.properties.test_wrong_specs import edited
from tests.runs import byte_llama, moved, saved, small_resnet, text_data
from tests.tiny_models import tiny_model

WRONG = {**test_wrong_specs.WRONG_SPECS, **test_wrong_families.WRONG_SPECS}


def small_model(model_type: str, name: str = "", changes: dict | None = None) -> PreTrainedModel:
    """A model with random weights, as they are in a file of bfloat16."""
    config = config_of(model_type, changes or {})
    model_class = getattr(transformers, name) if name else model_class_for(config)
    return model_with_random_weights(model_class, config, 0, torch.bfloat16)


def random(spec: PermutationSpec, seed: int = 3) -> hf_llfc.Alignment:
    return spec.random_alignment(torch.Generator().manual_seed(seed))


def one_of_each_file() -> list:
    seen: set[str] = set()
    rows = []
    for model_type, (module, _) in FAMILIES.items():
        if model_type != "blip_text_model":  # built within BLIP only
            rows.append(pytest.param(model_type, marks=[pytest.mark.zoo] if module in seen else []))
            seen.add(module)
    return rows


@pytest.mark.parametrize("model_type", one_of_each_file())
def test_a_true_symmetry_of_a_model_in_bfloat16_is_never_refused(model_type: str):
    checkpoint = open_checkpoint(small_model(model_type))
    found = probe(random(PermutationSpec.from_config(checkpoint.config)), checkpoint)
    assert found.keys() == {"change", "precision"}, found
    assert found["change"] <= NOISE[getattr(torch, found["precision"])]


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(each, marks=() if each in test_wrong_specs.WRONG_SPECS else pytest.mark.zoo) for each in WRONG],
)
def test_a_false_symmetry_is_refused_with_the_axis_that_is_none(mistake: str):
    if mistake in test_wrong_specs.WRONG_SPECS:
        (family, head), edit, new = test_wrong_specs.WRONG_SPECS[mistake]
        model = tiny_model(family, head).to(torch.bfloat16)
    else:
        model_type, name, changes, edit, new = test_wrong_families.WRONG_SPECS[mistake]
        model = small_model(model_type, name, changes)
    spec = PermutationSpec.from_config(model.config)
    wrong = edited(spec, model.config, *edit, **new)
    changed = [name for name, tensor in wrong.tensors.items() if tensor != spec.tensors[name]]
    suspects = {use.axis for each in (spec, wrong) for name in changed for use in each.tensors[name].axes}
    with pytest.raises(AlignmentError) as error:
        probe(random(wrong), open_checkpoint(model))
    message = str(error.value)
    assert any(f"The axis {axis} (" in message and f"--exclude {axis.split('.')[0]})" in message for axis in suspects)
    assert message.startswith(type(model).__name__) and "inspect" in message


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("gemma2", "Gemma2ForCausalLM")],
)
def test_a_rotary_factor_that_a_model_ignores_as_it_was_once_read(model_type: str, name: str):
    """Half of the channels were taken to have no rotary embedding, and moved."""
    model = small_model(model_type, name, {"partial_rotary_factor": 0.5})
    spec = PermutationSpec.from_config(model.config)
    half = spec.axes["head_dim"].size // 2
    halves = (r"\((.*) head_dim\)", r"(\1 rotary + inside)")
    wrong = edited(spec, model.config, "[qk]_proj", *halves, rotary=half, inside=half).fix("rotary")
    with pytest.raises(AlignmentError, match=r"The axis inside \(model\.layers\.0\.self_attn\.k_proj\.weight, "):
        probe(random(wrong), open_checkpoint(model))


def test_an_odd_rotary_width_as_it_was_once_counted():
    """Nine of twelve channels were taken to have a rotary embedding, which acts on ten."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    model = small_model("qwen3_next", "Qwen3NextForCausalLM", {"head_dim": 12, "rope_parameters": rope})
    spec = PermutationSpec.from_config(model.config)
    sizes = {"rotary": 9, "head_dim.1": 3, "head_dim.mtp": 3}
    assert {axis: spec.axes[axis].size for axis in sizes} == {"rotary": 10, "head_dim.1": 2, "head_dim.mtp": 2}
    wrong = replace(
        spec, axes={name: replace(axis, size=sizes.get(name, axis.size)) for name, axis in spec.axes.items()}
    )
    with pytest.raises(AlignmentError, match=r"The axis head_dim\.1 \(model\.layers\.1\.self_attn\.k_norm\.weight, "):
        probe(random(wrong, seed=5), open_checkpoint(model))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two Llamas in bfloat16; the second lies otherwise."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = (saved(each.bfloat16(), folder / name) for each, name in _LLAMAS)
    return str(first), str(second)


_LLAMAS = ((byte_llama(0), "a"), (moved(byte_llama(1), 2), "b"))


@pytest.fixture
def false_symmetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels under a rotary embedding taken for symmetric in every Llama."""

    def wrong(checkpoint: Checkpoint) -> PermutationSpec:
        spec = PermutationSpec.from_config(checkpoint.config)
        return edited(spec, checkpoint.config, "[qk]_proj", r"\bhead_dim\b", "inside", inside="head_dim")

    monkeypatch.setattr(specs, "spec_of", wrong)


REFUSED = (
    r"b: moved, it answers otherwise than before: .* The axis inside \(model\.layers\.0\.self_attn\.k_proj\.weight"
)


def merge(pair: tuple[str, str], out: Path, **options: Any) -> Any:
    return hf_llfc.merge(list(pair), out=out, align={"method": "weight_matching", **options})


def align_command(pair: tuple[str, str], out: Path) -> None:
    """The command's work, whose errors the command line would catch."""
    settings = {"models": [{"model": pair[1]}], "base_model": pair[0], "merge_method": "task_arithmetic"}
    write_aligned(load_recipe({**settings, "align": {}, "output_dir": str(out)}))


@pytest.mark.parametrize(
    "work",
    [
        merge,
        align_command,
        lambda pair, out: hf_llfc.align(pair[1], to=pair[0]),
        lambda pair, out: hf_llfc.align_all([*pair, pair[0]]),
        lambda pair, out: merge((*pair, pair[0]), out, together="universe"),
        lambda pair, out: merge((*pair, pair[0]), out, together="star"),
    ],
    ids=["merge", "align command", "align", "align_all", "universe", "star"],
)
def test_whatever_aligns_refuses_it_before_anything_is_written(work, pair, false_symmetry, tmp_path):
    with pytest.raises(AlignmentError, match=REFUSED):
        work(pair, tmp_path / "out")
    assert not any(path.is_file() for path in tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_diagnosis_refuses_it_too(pair, false_symmetry, tmp_path):
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "max_length": 32}
    with pytest.raises(AlignmentError, match=REFUSED):
        hf_llfc.diagnose(*pair, data, align="weight_matching")
    wrong = hf_llfc.align(pair[1], to=pair[0], probe=False)
    with pytest.raises(AlignmentError, match=REFUSED):
        hf_llfc.diagnose(*pair, data, align=wrong)


def test_an_alignment_from_a_file_is_probed(pair, false_symmetry, tmp_path):
    hf_llfc.align(pair[1], to=pair[0], probe=False).save(tmp_path / "wrong.safetensors")
    words = [pair[1], "--to", pair[0], "--out", str(tmp_path / "out"), "--use", str(tmp_path / "wrong.safetensors")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hf_llfc.pipeline.single_stages.spec_of", specs.spec_of)
        assert main(["align", *words]) == 2
        assert not (tmp_path / "out").exists()
        assert main(["align", *words, "--no-probe"]) == 0


def test_the_probe_can_be_switched_off_and_says_so(pair, false_symmetry, tmp_path):
    result = merge(pair, tmp_path / "out", probe=False)
    assert result.alignments[0]["probe_left_out"] == "not asked for"
    recipe = (tmp_path / "out" / "llfc" / "recipe.yaml").read_text()
    assert "probe: false" in recipe
    card = (tmp_path / "out" / "README.md").read_text()
    assert "whether it answers as before was not probed (not asked for)" in card


def test_what_was_found_is_told_everywhere(pair, tmp_path):
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "max_length": 32}
    out = tmp_path / "out"
    align = {"method": "weight_matching"}
    result = hf_llfc.merge(list(pair), out=out, align=align, diagnose={**data, "alphas": [0.5]})
    probe_of_file = hf_llfc.Alignment.load(out / "llfc" / "alignment.safetensors").metadata["probe"]
    assert probe_of_file["precision"] == "float32" and 0 < probe_of_file["change"] <= NOISE[torch.float32]
    in_report = json.loads((out / "llfc" / "llfc_report.json").read_text())["alignment"]
    in_record = json.loads((out / "llfc" / "run.json").read_text())["alignments"][0]
    for found in (result.alignments[0], in_report, in_record):
        assert {"probe_change": probe_of_file["change"], "probe_precision": "float32"}.items() <= found.items()
    words = f"random inputs give the same answers to {probe_of_file['change']:.0e}"
    assert words in (out / "README.md").read_text() and words in result.alignments[0]["sentence"]


def test_what_is_not_moved_is_not_run(pair, monkeypatch):
    monkeypatch.setattr(probing, "runnable", lambda checkpoint: pytest.fail("it is run"))
    alignment = hf_llfc.align(pair[0], to=pair[0])
    assert alignment.is_identity
    assert alignment.metadata["probe"] == {"change": 0.0, "precision": "float32"}


def moved_llama() -> tuple[hf_llfc.Alignment, Checkpoint]:
    checkpoint = open_checkpoint(byte_llama(0).bfloat16())
    return random(PermutationSpec.from_config(checkpoint.config)), checkpoint


def test_a_model_without_room_in_memory_is_read_as_its_modules_run(monkeypatch):
    alignment, checkpoint = moved_llama()
    in_memory = probing._Run(checkpoint).change(alignment, torch.float32)
    monkeypatch.setattr(probing, "available_memory", lambda: 0)
    monkeypatch.setattr("hf_llfc.checkpoints.load_model", lambda *_, **__: pytest.fail("it is loaded"))
    assert probing._Run(checkpoint).change(alignment, torch.float32) == in_memory
    assert probe(alignment, checkpoint)["change"] == float(f"{in_memory:.0e}")
    assert probing.probe_memory(checkpoint) == 256 * 24 * (4 + 2)
    assert sample_inputs(byte_llama(0), batch_size=probing.ROWS)["input_ids"].numel() == probing.TOKENS


def test_a_model_that_cannot_be_run_is_left_out_with_the_reason(monkeypatch, caplog, tmp_path):
    checkpoint = open_checkpoint(small_resnet(0))
    alignment = random(PermutationSpec.from_config(checkpoint.config))
    assert probe(alignment, checkpoint).keys() == {"change", "precision"}
    monkeypatch.setattr(probing, "available_memory", lambda: 0)
    found = probe(alignment, checkpoint)
    assert found.keys() == {"left_out"} and "batch normalization" in found["left_out"]
    assert "was not probed" in caplog.text
    monkeypatch.setattr(checkpoint.settings.config, "architectures", ["Unheard"])
    nameless = replace(checkpoint, model_class=None, architecture="UnheardForNothing")
    assert probe(alignment, nameless) == {"left_out": "its model class UnheardForNothing is not known"}


def test_what_looks_like_noise_is_looked_at_again_in_float64(monkeypatch):
    alignment, checkpoint = moved_llama()
    monkeypatch.setitem(NOISE, torch.float32, 0.0)
    found = probe(alignment, checkpoint)
    assert found["precision"] == "float64" and 0 < found["change"] < 1e-12


def test_a_model_that_does_not_run_in_float64_is_judged_in_float32(monkeypatch):
    model = small_model("gpt2", "GPT2LMHeadModel", {"reorder_and_upcast_attn": True})
    checkpoint, spec = open_checkpoint(model), PermutationSpec.from_config(model.config)
    monkeypatch.setitem(NOISE, torch.float32, 0.0)
    found = probe(random(spec), checkpoint)
    assert found["precision"] == "float32" and 0 < found["change"] < 1e-5
    wrong = edited(spec, model.config, r"mlp\.c_fc", r"neurons\.(\d)", r"others.\1", others="neurons.0")
    with pytest.raises(AlignmentError, match=r"rounding makes 1e-03 at most\. The axis (others|neurons)\.0"):
        probe(random(wrong), checkpoint)


@pytest.mark.parametrize("tied", [False, True])
def test_all_groups_are_probed_against_the_model_as_it_was_opened(tied):
    checkpoint = open_checkpoint(byte_llama(0, tie_word_embeddings=tied).bfloat16())
    form = canonical_form(checkpoint.config)
    canonical = canonical_checkpoint(checkpoint, form)
    for alignment in (random(form.spec), form.spec.identity_alignment()):
        found = probe(alignment, canonical)
        assert found["precision"] == "float32" and 0 < found["change"] <= NOISE[torch.float32]
    wrong = replace(form, norms=tuple(replace(norm, neutral=0.0) for norm in form.norms))
    with pytest.raises(AlignmentError, match="canonical form is not the same model; align with the groups"):
        probe(random(wrong.spec), canonical_checkpoint(checkpoint, wrong))
