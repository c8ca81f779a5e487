"""Commutativity matching: f is what the diagnosis measures, it never rises, and planted transforms are found."""

import copy

import pytest
import torch

import hf_llfc
from hf_llfc.adapters.canonical_forms import canonical_form
from hf_llfc.alignment import match_activations
from hf_llfc.alignment.commutativity_matching import _lowest, match_commutativity
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from hf_llfc.errors import AlignmentError, LLFCError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.symmetry import Alignment, PermutationSpec
from hf_llfc.symmetry.transforms import Permutation
from tests.runs import byte_llama, moved, text_data


def batches(count: int = 4):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 256, (6, 16), generator=generator)} for _ in range(count)]


def directly(a, b, found: Alignment) -> float:
    """Σ ‖(W_A − W_B)(H_A − H_B)‖² / (‖W_A H_A‖² + ‖W_B H_B‖²) of the moved model itself, over all batches at once."""
    again = copy.deepcopy(b)
    again.load_state_dict(found.apply(b.state_dict()))
    seen = []
    for model in (a, again):
        inputs: dict[str, list[torch.Tensor]] = {}
        hooks = [
            module.register_forward_hook(
                lambda module, taken, given, name=name, inputs=inputs: inputs.setdefault(name, []).append(taken[0])
            )
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        with torch.no_grad():
            for batch in batches():
                model(**batch)
        for hook in hooks:
            hook.remove()
        seen.append({name: torch.cat(tensors).flatten(0, -2).double() for name, tensors in inputs.items()})
    total = 0.0
    for name, of_a in seen[0].items():
        weights = [dict(model.named_modules())[name].weight.double() for model in (a, again)]
        apart = (of_a - seen[1][name]) @ (weights[0] - weights[1]).T
        sizes = [(of_a @ weights[0].T).square().sum(), (seen[1][name] @ weights[1].T).square().sum()]
        total += float(apart.square().sum() / (sizes[0] + sizes[1]))
    return total


@pytest.mark.parametrize("start", ["identity", "random"])
def test_the_objective_is_the_product_of_the_moved_model_and_falls(start):
    a, b = byte_llama(0), byte_llama(1)
    spec = PermutationSpec.from_config(a.config)
    begin = (
        spec.identity_alignment() if start == "identity" else spec.random_alignment(torch.Generator().manual_seed(3))
    )
    found = match_commutativity(a, b, batches(), spec, begin)
    assert found.metadata["commutativity_before"] == pytest.approx(directly(a, b, begin), rel=1e-4)
    assert found.metadata["commutativity_after"] == pytest.approx(directly(a, b, found), rel=1e-4)
    assert found.metadata["commutativity_after"] < 0.999 * found.metadata["commutativity_before"]


def test_a_moved_model_is_found_from_nearby():
    """A few units exchanged: the objective is zero at the answer, and the way there is downhill."""
    a = byte_llama(0)
    spec = PermutationSpec.from_config(a.config)
    transforms = dict(spec.identity_alignment().transforms)
    for axis, transform in transforms.items():
        if ".mlp" in axis or "neurons" in axis:
            perm = transform.perm.clone()
            perm[..., :4] = perm[..., [1, 0, 3, 2]]
            transforms[axis] = Permutation(perm)
    planted = Alignment(spec, transforms)
    assert not planted.is_identity
    b = copy.deepcopy(a)
    b.load_state_dict(planted.apply(a.state_dict()))
    found = match_commutativity(a, b, batches(), spec, spec.identity_alignment())
    assert found.metadata["commutativity_before"] > 1e-3
    assert found.metadata["commutativity_after"] < 1e-9
    assert found.then(planted).is_identity or planted.then(found).is_identity


def canonical(model):
    checkpoint = canonical_checkpoint(open_checkpoint(model), canonical_form(model.config))
    return checkpoint, dict(checkpoint.state_dict())


def test_activation_matching_finds_planted_matrices():
    """Procrustes on cross-moments: residual stream, value channels and phases of one model in random coordinates."""
    model = byte_llama(0, tie_word_embeddings=False)
    checkpoint, state = canonical(model)
    spec = canonical_form(model.config).spec
    planted = spec.random_alignment(torch.Generator().manual_seed(4))
    a, b = (load_model(checkpoint, state_dict=each).eval() for each in (state, planted.apply(state)))
    found = match_activations(a, b, batches(12), spec)
    assert not found.metadata["unmatched"]
    again = found.apply(dict(open_checkpoint(b).state_dict()))
    worst = max(float((value - again[name]).abs().max() / value.abs().max()) for name, value in state.items())
    assert worst < 2e-2


def test_commutativity_of_matrices_falls():
    models = []
    for seed in (0, 1):
        checkpoint, state = canonical(byte_llama(seed))
        models.append(load_model(checkpoint, state_dict=state).eval())
    spec = canonical_form(models[0].config).spec
    start = spec.identity_alignment()
    found = match_commutativity(models[0], models[1], batches(), spec, start, max_sweeps=3)
    assert found.metadata["commutativity_after"] < 0.99 * found.metadata["commutativity_before"]
    assert any(not transform.is_identity for transform in found.transforms.values())


def test_lowest_point_of_a_quartic():
    share, value = _lowest([(x - 0.3) ** 2 * (x + 2) for x in (0, 0.25, 0.5, 0.75, 1)])
    assert (share, value) == (pytest.approx(0.3), pytest.approx(0, abs=1e-9))
    assert _lowest([5, 4, 3, 2, 1])[0] == 1.0


def test_nothing_to_look_at_is_refused():
    a = byte_llama(0)
    spec = PermutationSpec.from_config(a.config)
    with pytest.raises(AlignmentError, match="needs calibration data"):
        match_commutativity(a, a, [], spec, spec.identity_alignment())
    with pytest.raises(LLFCError, match="commutativity matching needs calibration data"):
        hf_llfc.align(a, to=a, method="commutativity_matching")


def test_a_run_by_name(tmp_path):
    a, b = byte_llama(0), moved(byte_llama(0), 5)
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32, labels=False)
    found = hf_llfc.align(b, to=a, method="commutativity_matching", calibration=data)
    assert found.metadata["method"] == "commutativity_matching"
    state = found.apply(b.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in a.state_dict().items())
