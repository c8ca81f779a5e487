"""Several models aligned: what star and universe do, in checkpoints, recipes and Python."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_llfc
from hf_llfc.alignment.checkpoints import align_checkpoints
from hf_llfc.alignment.together import align_all
from hf_llfc.checkpoints import load_model, open_checkpoint
from hf_llfc.errors import AlignmentError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.parents.provenance import alignment_summary
from hf_llfc.publishing.record import AlignmentSummary
from hf_llfc.publishing.words import alignment_sentence
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment
from tests.runs import byte_llama, moved, saved, text_data
from tests.tiny_models import tiny_model


def near(seed: int, amount: float):
    """The model of seed 0, noise added, in coordinates of its own."""
    model = byte_llama(0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator))
    return moved(model, seed)


@pytest.fixture
def around_one(tmp_path: Path) -> list[Path]:
    """Four models of which the third lies in the middle of the others."""
    amounts = (0.4, 0.4, 0.0, 0.4)
    return [saved(near(seed, amount), tmp_path / f"model-{seed}") for seed, amount in enumerate(amounts)]


@pytest.fixture
def planted(tmp_path: Path) -> list[Path]:
    """The same function in four coordinates."""
    return [saved(moved(byte_llama(0), seed), tmp_path / f"model-{seed}") for seed in range(4)]


def aligned(paths: list[Path], **options) -> list[Alignment | None]:
    opened = [open_checkpoint(path) for path in paths]
    return align_all(opened[0], opened, AlignSection(**options))


@pytest.mark.parametrize("together", ["reference", "star", "universe"])
def test_planted_transforms_come_back_whatever_way(together, planted, tmp_path):
    result = hf_llfc.merge(planted, out=tmp_path / "out", align={"together": together})
    original = load_file(planted[0] / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-6, atol=1e-7)
    assert [summary["cosine_after"] for summary in result.alignments] == pytest.approx([1.0] * 3)
    files = {path.name for path in (tmp_path / "out" / "llfc").glob("*.safetensors")}
    assert files == {f"alignment-{place}.safetensors" for place in (1, 2, 3)}
    stored = Alignment.load(tmp_path / "out" / "llfc" / "alignment-2.safetensors")
    assert stored.metadata["model"]["id"] == f"./{planted[2].name}"
    assert stored.metadata.get("universe", {}).get("models") == (4 if together == "universe" else None)


def test_a_star_has_the_model_in_the_middle_as_its_centre(around_one):
    opened = [open_checkpoint(path) for path in around_one]
    star = aligned(around_one, together="star")
    assert star[0] is None
    for alignment in star[1:]:
        assert alignment.metadata["star"]["centre"] == f"./{around_one[2].name}"
        assert alignment.metadata["star"]["models"] == 4
    # Each goes onto the centre, and then with it onto the first.
    onto = [align_checkpoints(opened[2], opened[place], AlignSection()) for place in (0, 1, 3)]
    back = onto[0].inverse()
    assert star[2].transforms == back.transforms
    assert star[1].transforms == onto[1].then(back).transforms
    assert star[3].transforms == onto[2].then(back).transforms
    pairs = {
        pair: align_checkpoints(opened[pair[0]], opened[pair[1]], AlignSection()).metadata["distance_after"]
        for pair in combinations(range(4), 2)
    }
    for place, distance in enumerate(star[1].metadata["star"]["distances"]):
        squares = [far**2 for pair, far in pairs.items() if place in pair]
        assert distance == pytest.approx((sum(squares) / 3) ** 0.5)
    for alignment, place in zip(star[1:], (1, 2, 3), strict=True):
        states = [dict(opened[each].state_dict()) for each in (0, place)]
        there = alignment.apply(states[1])
        products = [
            sum(float((states[0][name].double() * each[name]).sum()) for name in there) for each in (states[1], there)
        ]
        assert alignment.metadata["objective_before"] == pytest.approx(products[0])
        assert alignment.metadata["objective_after"] == pytest.approx(products[1])


def test_a_star_of_another_method_has_the_same_centre(around_one, tmp_path):
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32, labels=False)
    star = aligned(around_one, together="star", method="activation_matching", calibration=data)
    assert {each.metadata["method"] for each in star[1:]} == {"activation_matching"}
    assert {each.metadata["star"]["centre"] for each in star[1:]} == {f"./{around_one[2].name}"}
    onto = align_checkpoints(
        *(open_checkpoint(around_one[place]) for place in (2, 0)),
        AlignSection("activation_matching", calibration=data),
    )
    assert star[2].transforms == onto.inverse().transforms


def test_a_universe_starts_from_activations_where_asked(planted, tmp_path):
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32, labels=False)
    found = aligned(planted, together="universe", start="activation_matching", calibration=data, restarts=1)
    assert found[1].metadata["sweeps"][0]["start"] == "given"
    assert found[1].metadata["universe"]["cosine_after"] == pytest.approx(1.0)


@pytest.mark.parametrize("groups", ["permutation", "full"])
def test_a_universe_by_activations_brings_planted_models_back(groups, planted, tmp_path):
    calibration = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes"}
    calibration |= {"max_length": 32, "labels": False}
    align = {"method": "activation_matching", "together": "universe", "groups": groups, "calibration": calibration}
    result = hf_llfc.merge(planted, out=tmp_path / "out", align=align)
    assert [summary["cosine_after"] for summary in result.alignments] == pytest.approx([1.0] * 3, abs=1e-3)
    assert all(summary["together"] == "universe" for summary in result.alignments)
    stored = Alignment.load(tmp_path / "out" / "llfc" / "alignment-2.safetensors")
    assert stored.metadata["method"] == "activation_matching"
    assert stored.metadata["universe"]["models"] == 4
    assert stored.metadata["universe"]["cosine_after"] > 0.999 > stored.metadata["universe"]["cosine_before"]
    ids = torch.arange(16)[None]
    original, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (planted[0], tmp_path / "out")
    )
    torch.testing.assert_close(merged, original, rtol=0, atol=2e-3)


def test_in_a_universe_by_activations_weights_match_what_no_activation_shows(tmp_path):
    """Experts that are fused into one tensor."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=64,
    )
    original = saved(transformers.MixtralForCausalLM(config), tmp_path / "model-0")
    paths = [original]
    for seed in (1, 2):
        checkpoint = open_checkpoint(original)
        random = hf_llfc.PermutationSpec.from_config(config).random_alignment(torch.Generator().manual_seed(seed))
        state = random.apply(dict(checkpoint.state_dict()))
        paths.append(saved(load_model(checkpoint, state_dict=state), tmp_path / f"model-{seed}"))
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32, labels=False)
    found = aligned(paths, together="universe", method="activation_matching", calibration=data)
    assert any(axis.startswith("experts") for axis in found[1].metadata["unmatched"])
    assert [each.metadata["cosine_after"] for each in found[1:]] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("together", ["star", "universe"])
def test_two_models_are_aligned_as_ever(together, around_one):
    ours, theirs = (aligned(around_one[:2], together=way)[1] for way in (together, "reference"))
    assert ours.transforms == theirs.transforms and ours.metadata == theirs.metadata


def test_a_base_is_one_of_the_models(planted, tmp_path):
    base = saved(byte_llama(0), tmp_path / "base")
    result = hf_llfc.merge(
        planted[1:],
        [1.0, 1.0, 1.0],
        out=tmp_path / "out",
        merge_method="task_arithmetic",
        base_model=base,
        align={"together": "universe"},
        parameters={"lambda": 0.5},
    )
    assert [summary["models"] for summary in result.alignments] == [4] * 3
    original = load_file(base / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-6, atol=1e-7)


def test_the_simplex_has_no_barrier_between_one_function(planted, tmp_path):
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32)
    apart, together = (
        hf_llfc.diagnose(*planted[:2], data, more=planted[2:], align=align)
        for align in ("none", {"together": "universe"})
    )
    assert len(together.path) == 4 + 6 + 1
    losses = [[point.loss for point in report.path] for report in (apart, together)]
    assert max(losses[0]) - min(losses[0]) > 0.01 and max(losses[1]) - min(losses[1]) < 1e-5
    assert all(row.llfc.mean < 1e-9 for row in together.layers)
    # The barrier is that of the point where it is largest.
    at = dict(zip((point.weights for point in apart.path), losses[0], strict=True))
    own = [at[tuple(float(place == each) for each in range(4))] for place in range(4)]
    heights = [
        loss - sum(weight * each for weight, each in zip(weights, own, strict=True)) for weights, loss in at.items()
    ]
    assert apart.barrier.loss == pytest.approx(max(heights))
    assert {entry["together"] for entry in together.alignment["alignments"]} == {"universe"}


def test_an_interrupted_run_reads_its_alignments_back(planted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    recipe = {
        "models": [{"model": str(path)} for path in planted],
        "align": {"method": "weight_matching", "groups": "full", "together": "universe"},
        "output_dir": str(out),
    }

    def fails(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hf_llfc.pipeline.flow.write_merge", fails)
        with pytest.raises(KeyboardInterrupt):
            hf_llfc.run(recipe)
    with monkeypatch.context() as patched:
        patched.setattr("hf_llfc.alignment.together.align_checkpoints", fails)
        patched.setattr("hf_llfc.alignment.match_universe", fails)
        again = hf_llfc.run(recipe)
    whole = hf_llfc.run({**recipe, "output_dir": str(tmp_path / "whole")})
    for name in ("model.safetensors", *(f"llfc/alignment-{place}.safetensors" for place in (1, 2, 3))):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert list(again.alignments) == list(whole.alignments)


def test_python_gives_one_alignment_a_model(planted):
    found = hf_llfc.align_all(planted, reference=1)
    assert found[1].is_identity and not found[0].is_identity
    states = [load_file(path / "model.safetensors") for path in planted]
    for alignment, state in zip(found, states, strict=True):
        there = alignment.apply(state)
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in there.items())
    assert hf_llfc.align_all(planted, reference=1, together="reference")[0].transforms == found[0].transforms


def test_what_is_said_of_it(around_one, tmp_path):
    by = {together: aligned(around_one, together=together)[1] for together in ("star", "universe")}
    summaries = {together: alignment_summary(alignment) for together, alignment in by.items()}
    assert summaries["star"]["centre"] == f"./{around_one[2].name}"
    assert f", in a star of 4 models around ./{around_one[2].name}; cosine" in summaries["star"]["sentence"]
    assert ", in a universe of 4 models; cosine" in summaries["universe"]["sentence"]
    assert "mean over all pairs" in summaries["universe"]["sentence"]
    told = alignment_sentence(AlignmentSummary.from_dict(summaries["star"]))
    assert "(star of 4 models around model-2)" in told
    hf_llfc.merge(around_one, out=tmp_path / "out", align={"together": "star"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of model-1 onto model-0 (star of 4 models around model-2) moved" in card
    assert str(tmp_path) not in (tmp_path / "out" / "llfc" / "run.json").read_text()
    assert json.loads((tmp_path / "out" / "llfc" / "run.json").read_text())["alignments"][0]["centre"] == "model-2"


class TestBadInput:
    def test_an_unknown_way(self, planted):
        with pytest.raises(AlignmentError, match=r"together: unknown 'univers'; did you mean 'universe'"):
            aligned(planted, together="univers")
        with pytest.raises(hf_llfc.LLFCError, match=r"align\.together: unknown 'univers'; did you mean 'universe'"):
            hf_llfc.align_all(planted, together="univers")
        with pytest.raises(hf_llfc.LLFCError, match=r"align\.restart: unknown key; did you mean 'restarts'"):
            hf_llfc.align_all(planted, restart=3)
        with pytest.raises(AlignmentError, match="there is no model 4"):
            hf_llfc.align_all(planted, reference=4)

    def test_a_universe_of_another_method(self, planted, tmp_path):
        by = "a universe is found by weight_matching or activation_matching, not by"
        with pytest.raises(AlignmentError, match=f"{by} commutativity_matching"):
            aligned(planted, together="universe", method="commutativity_matching")
        with pytest.raises(AlignmentError, match="activation matching needs calibration data"):
            aligned(planted, together="universe", method="activation_matching")
        with pytest.raises(hf_llfc.LLFCError, match=rf"align\.together: {by} learned_matching"):
            hf_llfc.merge(
                planted,
                out=tmp_path / "out",
                align={
                    "together": "universe",
                    "method": "learned_matching",
                    "calibration": {"task": "text-generation", "dataset": "x"},
                },
            )
        with pytest.raises(hf_llfc.LLFCError, match=r"align\.together: has no meaning for the method none"):
            hf_llfc.merge(planted, out=tmp_path / "out", align={"together": "star", "method": "none"})

    def test_models_that_do_not_fit(self, planted, tmp_path):
        other = saved(tiny_model("gpt2", "causal-lm", seed=0), tmp_path / "other")
        with pytest.raises(hf_llfc.LLFCError, match="cannot be merged"):
            hf_llfc.align_all([*planted, other])

    def test_the_reference_of_a_diagnosis(self, planted, tmp_path):
        data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32)
        with pytest.raises(AlignmentError, match=r"align\.reference: has no meaning in a diagnosis"):
            hf_llfc.diagnose(*planted[:2], data, align={"reference": 1})
