"""Learned matching: relaxations that stay in their groups, transforms that are found, and the runs that use it."""

import copy
import itertools
import json

import pytest
import torch
import transformers

import hf_llfc
from hf_llfc.adapters.canonical_forms import canonical_form
from hf_llfc.alignment.learned_matching import Learning, learn_matching
from hf_llfc.alignment.relaxations import Multiplied, RelaxedMatrix, RelaxedPermutation, sinkhorn
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from hf_llfc.diagnostics.features.layers import select_layers
from hf_llfc.diagnostics.objectives import LLFCGap, TaskLoss
from hf_llfc.errors import AlignmentError, LLFCError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.evaluation.scoring import score_samples, task_loss
from hf_llfc.symmetry import Alignment, PermutationSpec
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS, cayley
from hf_llfc.symmetry.orthogonal import Orthogonal
from hf_llfc.symmetry.transforms import Permutation
from tests.runs import byte_llama, image_data, moved, saved, small_resnet, text_data


@pytest.mark.parametrize("group", MATRIX_GROUPS)
@pytest.mark.parametrize("parent", [None, 3])
def test_the_cayley_transform_stays_in_the_group(group, parent):
    generator = torch.Generator().manual_seed(0)
    shape = (8, 8) if parent is None else (parent, 8, 8)
    matrix = cayley(MATRIX_GROUPS[group].tangent(torch.randn(shape, generator=generator, dtype=torch.float64)))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(8, dtype=torch.float64).expand(shape))
    torch.testing.assert_close(MATRIX_GROUPS[group].nearest(matrix), matrix)
    assert float((matrix - torch.eye(8, dtype=torch.float64)).abs().max()) > 0.1


@pytest.mark.parametrize("group", MATRIX_GROUPS)
def test_a_relaxed_matrix_follows_a_gradient_inside_its_group(group):
    generator = torch.Generator().manual_seed(1)
    start = Orthogonal.random(group, 8, 2, generator=generator)
    relaxed = RelaxedMatrix(start, group)
    torch.testing.assert_close(relaxed().double(), start.matrix, atol=1e-6, rtol=0)
    target = (
        cayley(0.2 * MATRIX_GROUPS[group].tangent(torch.randn(2, 8, 8, generator=generator))) @ start.matrix.float()
    )
    optimiser = torch.optim.Adam(relaxed.parameters(), 0.02)
    for _ in range(300):
        loss = (relaxed() - target).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1e-6
    found = relaxed.transform().matrix
    torch.testing.assert_close(MATRIX_GROUPS[group].nearest(found), found)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_a_relaxed_permutation_is_one_with_a_gradient(temperature):
    start = Permutation.random(6, 2, generator=torch.Generator().manual_seed(2))
    relaxed = RelaxedPermutation(start, temperature)
    assert relaxed.transform() == start
    rows = torch.arange(12.0).reshape(2, 6)
    torch.testing.assert_close(Multiplied(relaxed()).apply(rows, 1, 0), start.apply(rows, 1, 0))
    target = torch.eye(6)[torch.stack([torch.randperm(6), torch.randperm(6)])]
    optimiser = torch.optim.Adam(relaxed.parameters(), 0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (relaxed() * -target).sum().backward()
        optimiser.step()
    assert torch.equal(torch.eye(6)[relaxed.transform().perm], target)


def test_sinkhorn_is_doubly_stochastic():
    soft = sinkhorn(torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(0)))
    for dim in (-1, -2):
        torch.testing.assert_close(soft.sum(dim), torch.ones(3, 7), atol=1e-3, rtol=0)


@pytest.mark.parametrize("task", ["text-generation", "fill-mask", "image-classification"])
def test_the_loss_that_is_learned_is_the_loss_that_is_reported(task):
    generator = torch.Generator().manual_seed(0)
    shape = (4,) if task == "image-classification" else (4, 6)
    logits, labels = torch.randn(*shape, 9, generator=generator), torch.randint(9, shape, generator=generator)
    if len(shape) == 2:
        labels[1, 3:] = -100
    scores = score_samples(task, logits, labels)
    shifted = labels[:, 1:] if task == "text-generation" else labels
    expected = scores.loss_sums.sum() / (shifted != -100).sum()
    torch.testing.assert_close(task_loss(task, logits, labels).double(), expected, rtol=1e-6, atol=0)


def canonical_pair(distance: float):
    """A GPT-2 in canonical form, the same in coordinates a short way off, and its spec."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    config.architectures = ["GPT2LMHeadModel"]
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    form = canonical_form(config)
    checkpoint = canonical_checkpoint(open_checkpoint(model), form)
    state = dict(checkpoint.state_dict())
    generator = torch.Generator().manual_seed(1)
    near = dict(form.spec.identity_alignment().transforms)
    for axis, transform in near.items():
        if isinstance(transform, Orthogonal):
            group = MATRIX_GROUPS[form.spec.axes[axis].group]
            rates = distance * torch.randn(transform.matrix.shape, generator=generator, dtype=torch.float64)
            near[axis] = Orthogonal(cayley(group.tangent(rates)))
    planted = Alignment(form.spec, near)
    return (
        load_model(checkpoint, state_dict=state).eval(),
        load_model(checkpoint, state_dict=planted.apply(state)).eval(),
        form.spec,
    )


def endless_tokens():
    generator = torch.Generator().manual_seed(3)
    while True:
        ids = torch.randint(1, 40, (8, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def test_the_llfc_gap_of_planted_transforms_is_closed():
    a, b, spec = canonical_pair(0.1)
    batch = next(endless_tokens())
    gap = LLFCGap(a, select_layers(a, {"input_ids": batch["input_ids"]}))
    found = learn_matching(
        a, b, endless_tokens(), spec, spec.identity_alignment(), gap, learning=Learning(steps=150, learning_rate=0.01)
    )
    losses = found.metadata["losses"]
    assert losses[-1] < 0.02 * losses[0]
    # Nothing is trained: in its new coordinates B computes what it did.
    again = copy.deepcopy(b)
    again.load_state_dict(found.apply(dict(open_checkpoint(b).state_dict())))
    with torch.no_grad():
        expected = b(batch["input_ids"]).logits
        torch.testing.assert_close(again(batch["input_ids"]).logits, expected, atol=1e-3, rtol=0)
        # And the merge is that of one model with itself.
        middle = copy.deepcopy(a)
        for merged, other in zip(middle.parameters(), again.parameters(), strict=True):
            merged.lerp_(other, 0.5)
        change = (middle(batch["input_ids"]).logits - expected).abs().max()
    assert float(change) < 0.1 * float(expected.abs().max())


def test_the_gap_of_a_model_with_itself_is_zero_and_that_of_others_is_not():
    a, b, _ = canonical_pair(0.3)
    batch = {"input_ids": next(endless_tokens())["input_ids"]}
    gap = LLFCGap(a, select_layers(a, batch))
    of_a, of_b = (dict(model.named_parameters()) for model in (a, b))
    middle = {name: (value + of_b[name]) / 2 for name, value in of_a.items()}
    assert gap(of_a, of_a, of_a, 0.5, batch).item() < 1e-9
    assert gap(of_a, of_b, middle, 0.5, batch).item() > 0.01


def test_padding_does_not_count():
    a, b, _ = canonical_pair(0.3)
    ids = next(endless_tokens())["input_ids"]
    masks = torch.ones_like(ids)
    padded = {"input_ids": torch.cat([ids, ids], 1), "attention_mask": torch.cat([masks, 0 * masks], 1)}
    gap = LLFCGap(a, select_layers(a, {"input_ids": ids, "attention_mask": masks}))
    of_a, of_b = (dict(model.named_parameters()) for model in (a, b))
    middle = {name: (value + of_b[name]) / 2 for name, value in of_a.items()}
    gaps = [gap(of_a, of_b, middle, 0.5, each).item() for each in ({"input_ids": ids, "attention_mask": masks}, padded)]
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-4)


def test_running_statistics_of_neither_parent_are_used_or_changed():
    model = small_resnet(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = TaskLoss(model, "image-classification")
    batch = {"pixel_values": torch.randn(12, 1, 32, 32), "labels": torch.arange(12) % 3}
    weights = dict(model.named_parameters())
    first = loss(weights, weights, weights, 0.5, batch)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(10)
    torch.testing.assert_close(loss(weights, weights, weights, 0.5, batch), first)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.sub_(10)
            torch.testing.assert_close(buffer, before[name], atol=1e-5, rtol=0)


def test_options_out_of_range_are_refused():
    a, b, spec = canonical_pair(0.1)
    start = spec.identity_alignment()
    loss = TaskLoss(a, "text-generation")
    for wrong in (Learning(steps=0), Learning(learning_rate=0.0)):
        with pytest.raises(AlignmentError, match="must be at least 1"):
            learn_matching(a, b, endless_tokens(), spec, start, loss, learning=wrong)
    with pytest.raises(AlignmentError, match="not finite in step"):
        learn_matching(a, b, endless_tokens(), spec, start, lambda *of: loss(*of) / 0)


def test_a_tied_embedding_moves_once():
    """Permutations of a GPT-2 whose head is its embedding: learned in the same names as its parameters."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4, n_positions=32)
    a, b = transformers.GPT2LMHeadModel(config).eval(), transformers.GPT2LMHeadModel(config).eval()
    spec = PermutationSpec.from_config(config)
    start = spec.random_alignment(torch.Generator().manual_seed(0))
    found = learn_matching(
        a, b, endless_tokens(), spec, start, TaskLoss(a, "text-generation"), learning=Learning(5, 1e-6)
    )
    assert all(found.transforms[axis] == transform for axis, transform in start.transforms.items())
    assert len(found.metadata["losses"]) == 5


def byte_data(folder, labels: bool) -> EvaluationConfig:
    return EvaluationConfig(
        "text-generation", str(text_data(folder)), tokenizer="bytes", max_length=32, batch_size=4, labels=labels
    )


@pytest.mark.parametrize("labels", [True, False])
def test_a_moved_model_is_left_where_weight_matching_brought_it(labels, tmp_path):
    a = byte_llama(0)
    b = moved(byte_llama(0), 5)
    found = hf_llfc.align(
        b, to=a, method="learned_matching", steps=4, learning_rate=1e-4, calibration=byte_data(tmp_path, labels)
    )
    assert found.metadata["method"] == "learned_matching"
    state = found.apply(b.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in a.state_dict().items())


def test_batch_norm_and_images(tmp_path):
    a, b = small_resnet(0), small_resnet(1)
    data = EvaluationConfig("image-classification", str(image_data(tmp_path)), batch_size=12)
    found = hf_llfc.align(b, to=a, method="learned_matching", steps=30, learning_rate=0.1, calibration=data)
    by_weights = hf_llfc.align(b, to=a)
    assert any(found.transforms[axis] != by_weights.transforms[axis] for axis in found.transforms)
    losses = found.metadata["losses"]
    assert min(losses[-3:]) < losses[0]


def test_a_recipe_learns(tmp_path):
    a, b = saved(byte_llama(0), tmp_path / "a"), saved(byte_llama(1), tmp_path / "b")
    calibration = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes"}
    align = {
        "method": "learned_matching",
        "groups": "full",
        "steps": 3,
        "calibration": {**calibration, "max_length": 32, "batch_size": 4},
    }
    result = hf_llfc.merge([a, b], out=tmp_path / "merged", align=align)
    assert result.alignments[0]["method"] == "learned_matching"
    merged = transformers.AutoModelForCausalLM.from_pretrained(result.folder)
    assert merged(torch.arange(8)[None]).logits.isfinite().all()
    kept = json.loads((result.folder / "llfc" / "run.json").read_text())
    assert "learned_matching" in json.dumps(kept)


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ({"method": "learned_matching"}, "align.calibration: learned matching needs calibration data"),
        ({"method": "weight_matching", "steps": 3}, "align.steps: has no meaning for the method weight_matching"),
        ({"method": "learned_matching", "steps": 0}, "align.steps: at least 1 is expected"),
        ({"method": "learned_matching", "learning_rate": -1.0}, "align.learning_rate: a number above 0"),
    ],
)
def test_wrong_sections_are_refused(align, message, tmp_path):
    with pytest.raises(LLFCError, match=message):
        hf_llfc.merge(["a", "b"], out=tmp_path / "merged", align=align)


def test_without_data_there_is_nothing_to_learn_from():
    models = [byte_llama(seed) for seed in (0, 1)]
    with pytest.raises(LLFCError, match="learned matching needs calibration data"):
        hf_llfc.align(models[1], to=models[0], method="learned_matching")


def test_batches_come_without_end_in_changing_order():
    from hf_llfc.alignment.checkpoints import _in_random_order

    batches = [{"place": torch.tensor(place)} for place in range(4)]
    seen = [int(batch["place"]) for batch in itertools.islice(_in_random_order(batches, 0), 12)]
    rounds = [seen[:4], seen[4:8], seen[8:]]
    assert all(sorted(each) == [0, 1, 2, 3] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
