"""Where a merge breaks, against networks that are put together by hand and run a sample at a time in float64."""

import copy
import math

import pytest
import torch

from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.diagnostics.features.parts import find_parts
from hf_llfc.diagnostics.measures.blocks import Blocks
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.streaming import over_batches
from hf_llfc.evaluation import evaluate_model
from hf_llfc.evaluation.models import evaluation_mode
from tests.diagnostics.pairs import data_of, pair, precise, samples_of, subject_of

FAMILIES = ("bert", "llama-tied", "vit", "resnet-basic", "bart", "albert", "perceptron")


def rows_of(subject, data, dtype=torch.float64):
    batch, _ = next(data.batches())
    with precise(dtype), evaluation_mode(*subject.models, subject.merge):
        measure = Blocks(subject, batch, data)
        return measure.rows(over_batches(data, measure.add, measure.sums, "measuring"))


def mixed(of_part, parts):
    """A model that takes every part from the model given for it."""
    model = copy.deepcopy(of_part[0])
    state = model.state_dict()
    for source, part in zip(of_part, parts, strict=True):
        state |= {name: source.state_dict()[name] for name in part.tensors if name in source.state_dict()}
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def heights(subject, parts, data):
    """The three losses of every part above the parents', from whole networks."""
    known = {}

    def loss(of_part):
        key = tuple(map(id, of_part))
        if key not in known:
            known[key] = evaluate_model(mixed(of_part, parts), data).loss
        return known[key]

    found = []
    for number in range(len(parts)):
        sums = [0.0, 0.0, 0.0, 0.0]
        for share, parent in zip(subject.shares, subject.models, strict=True):
            count, merge = len(parts), subject.merge
            networks = (
                [merge if other == number else parent for other in range(count)],
                [parent if other == number else merge for other in range(count)],
                [merge if other <= number else parent for other in range(count)],
                [merge if other < number else parent for other in range(count)],
            )
            own = loss([parent] * count)
            for index, network in enumerate(networks):
                sums[index] += share * (loss(network) - own)
        found.append((sums[0], sums[1], sums[2] - sums[3]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_that_of_networks_put_together_by_hand(family):
    models = pair(family)
    data = data_of(family, models[0].config, count=5, batch_size=3)
    subject = subject_of(models, (0.375, 0.625))
    rows = rows_of(subject, data)
    parts = find_parts(models[0], next(data.batches())[0])
    assert [row.block for row in rows] == [part.name for part in parts]
    with precise(torch.float64):
        expected = heights(subject, parts, data)
        losses = [evaluate_model(model, data).loss for model in (*models, subject.merge)]
    for row, numbers in zip(rows, expected, strict=True):
        assert (row.alone, row.without, row.step) == pytest.approx(numbers, abs=1e-9), row
    barrier = losses[2] - 0.375 * losses[0] - 0.625 * losses[1]
    assert sum(row.step for row in rows) == pytest.approx(barrier, abs=1e-9)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "vit", "resnet-basic", "perceptron"])
def test_drift_is_split_by_running_the_block_on_the_blend(family):
    models = pair(family)
    data = data_of(family, models[0].config, count=5, batch_size=3)
    subject = subject_of(models, (0.375, 0.625))
    rows = {row.block: row for row in rows_of(subject, data)}
    blocks = [part.name for part in find_parts(models[0], next(data.batches())[0]) if part.input is not None]
    assert blocks
    for block in blocks:
        off = arose = size = 0.0
        for sample in samples_of(data, torch.float64):
            (in_a, out_a), (in_b, out_b), (_, merged) = (
                run(model, block, sample) for model in (*models, subject.merge)
            )
            blend = 0.375 * out_a + 0.625 * out_b
            _, local = run(subject.merge, block, sample, 0.375 * in_a + 0.625 * in_b)
            off += float((merged - blend).square().sum())
            arose += float(((merged - blend) * (local - blend)).sum())
            size += float(blend.square().sum())
        assert rows[block].drift == pytest.approx(math.sqrt(off / size), rel=1e-8)
        assert rows[block].local == pytest.approx(arose / off, rel=1e-8)
    assert rows[blocks[0]].local == pytest.approx(1) or family in ("bert", "gpt2", "llama-tied", "vit", "resnet-basic")


def run(model, block, sample, given=None):
    """What a block takes and gives, with another input where one is given."""
    seen = []

    def before(module, args, kwargs):
        name = "hidden_states" if not args else None
        seen.append((args[0] if args else kwargs[name]).detach().clone())
        if given is None:
            return None
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, name: given})

    def after(module, args, output):
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).detach().clone())

    module = model.get_submodule(block)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    with torch.no_grad(), precise(torch.float64):
        model(**sample)
    for handle in handles:
        handle.remove()
    return seen


def test_angles_are_those_of_the_task_vectors_over_the_base():
    models = [*pair("perceptron"), pair("perceptron")[0]]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        for parameter in models[2].parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    weights = (0.5, 0.5, 0.0)
    combined = CombinedModel(models)
    combined.move_to(weights)
    subject = Subject(tuple(models), combined.model, (0.5, 0.5, 0.0), weights, has_base=True)
    data = data_of("perceptron", models[0].config)
    rows = rows_of(subject, data)
    for row, part in zip(rows, find_parts(models[0], next(data.batches())[0]), strict=True):
        a, b, base = (torch.cat([model.state_dict()[name].flatten() for name in part.tensors]) for model in models)
        cosine = torch.nn.functional.cosine_similarity(a - base, b - base, dim=0)
        assert row.angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-9)
        moved = ((a - base).square().sum() + (b - base).square().sum()) / 2
        assert row.distance == pytest.approx(math.sqrt(moved / base.square().sum()), rel=1e-9)


def test_without_labels_the_ensemble_stands_in():
    models = pair("gpt2")
    subject = subject_of(models, (0.5, 0.5))
    data = data_of("gpt2", models[0].config, labels=False)
    rows = rows_of(subject, data)
    with precise(torch.float64), torch.no_grad():
        losses = []
        for sample in samples_of(data, torch.float64):
            logits = [model(**sample).logits for model in (*models, subject.merge)]
            ensemble = ((logits[0] + logits[1]) / 2).softmax(-1)
            losses.append([float(-(ensemble * each.log_softmax(-1)).sum()) for each in logits])
    a, b, merge = (sum(each) / len(losses) for each in zip(*losses, strict=True))
    assert sum(row.step for row in rows) == pytest.approx(merge - (a + b) / 2, rel=1e-9)


def test_batch_norm_is_recomputed_in_every_network():
    from hf_llfc.diagnostics.batch_norm import recompute_batch_norm

    models = pair("resnet-basic")
    data = data_of("resnet-basic", models[0].config, count=6, batch_size=6)
    subject = subject_of(models, (0.5, 0.5))
    recompute_batch_norm(subject.merge, data.batches())
    subject = Subject(subject.models, subject.merge, subject.shares, subject.blend, batch_norm_data=data)
    rows = rows_of(subject, data)
    parts = find_parts(models[0], next(data.batches())[0])
    total = 0.0
    for parent in models:
        network = mixed([subject.merge if part == parts[1] else parent for part in parts], parts)
        whole = copy.deepcopy(network)
        recompute_batch_norm(whole, data.batches())
        later = {name for part in parts[1:] for name in part.tensors}
        network.load_state_dict(
            {name: (whole if name in later else network).state_dict()[name] for name in whole.state_dict()}
        )
        total += 0.5 * (evaluate_model(network, data).loss - evaluate_model(parent, data).loss)
    assert rows[1].alone == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("world", [2, 5])
def test_sums_of_simulated_processes_are_those_of_one(world):
    models = pair("bert")
    subject = subject_of(models, (0.5, 0.5))
    data = data_of("bert", models[0].config, batch_size=2)

    def sums_of(rank, of):
        with precise(torch.float64), evaluation_mode(*models, subject.merge):
            measure = Blocks(subject, next(data.batches())[0], data)
            for batch, sample_ids in data.batches(rank, of):
                measure.add(batch, sample_ids)
        return measure.sums.cpu()

    whole, merged = sums_of(0, 1), sums_of(0, world)
    for rank in range(1, world):
        merged.merge(sums_of(rank, world))
    assert merged.count == whole.count and merged.losses == pytest.approx(whole.losses)
    assert torch.allclose(merged.drift, whole.drift, rtol=1e-12)
