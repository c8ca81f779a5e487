"""The barrier taken apart at the logits, beside losses that torch computes and formulas in float64."""

import numpy as np
import pytest
import torch
from scipy import stats

from hf_llfc.diagnostics.decomposition import Decomposition, DecompositionSums, decompose
from hf_llfc.evaluation import predicted
from hf_llfc.evaluation.predicted import Predicted

WEIGHTS = [(0.5, 0.5), (0.2, 0.8), (0.2, 0.5, 0.3), (1.5, -0.7, 0.2)]


def logits(seed: int, models: int, count: int = 40, classes: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [8 * torch.randn(count, classes, generator=generator, dtype=torch.float64) + 30 for _ in range(models)]


def measured_barrier(
    parents: list[torch.Tensor], weights: tuple[float, ...], merged: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    def losses(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(values, labels, reduction="none")

    return losses(merged) - sum(weight * losses(each) for weight, each in zip(weights, parents, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_parts_add_up_to_the_measured_barrier(weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "ELEMENTS_AT_ONCE", 20)  # many slices
    *parents, merged = logits(0, len(weights) + 1)
    labels = torch.arange(40) % 7
    found = decompose(parents, weights, merged, labels)
    expected = measured_barrier(parents, weights, merged, labels)
    assert found.barrier is not None
    assert torch.allclose(found.barrier, expected, rtol=0, atol=1e-12)
    blend = torch.stack([weight * each for weight, each in zip(weights, parents, strict=True)]).sum(0)
    log_p, log_q = blend.log_softmax(-1), merged.log_softmax(-1)
    assert torch.allclose(found.divergence, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=0, atol=1e-12)
    assert (found.bound >= found.barrier).all()
    if min(weights) >= 0:
        assert (found.gain >= 0).all()
        assert (found.spread >= found.divergence).all()


def test_in_float32_the_barrier_is_that_of_the_same_logits() -> None:
    *parents, merged = (each.float() for each in logits(1, 3))
    labels = torch.arange(40) % 7
    found = decompose(parents, (0.3, 0.7), merged, labels)
    expected = measured_barrier([each.double() for each in parents], (0.3, 0.7), merged.double(), labels)
    assert found.barrier is not None
    assert torch.allclose(found.barrier, expected, rtol=0, atol=1e-12)


def test_labels_drawn_from_the_ensemble_give_the_estimate() -> None:
    """The mean of the exact barrier over all labels, weighted as the ensemble does."""
    first, second, merged = logits(2, 3)
    probabilities = ((first + second) / 2).softmax(-1)
    barriers = [decompose([first, second], (0.5, 0.5), merged, torch.full((40,), label)).barrier for label in range(7)]
    expected = (torch.stack(barriers, dim=1) * probabilities).sum(1)
    found = decompose([first, second], (0.5, 0.5), merged)
    assert found.barrier is None
    assert found.cost is None
    assert torch.allclose(found.estimate, expected, rtol=0, atol=1e-12)


def test_logits_that_connect_linearly_only_gain() -> None:
    first, second = logits(3, 2)
    found = decompose([first, second], (0.5, 0.5), (first + second) / 2, torch.zeros(40, dtype=torch.long))
    assert torch.allclose(found.barrier, -found.gain, atol=1e-12)
    assert found.gain.mean() > 0.1
    assert torch.allclose(found.spread, torch.zeros(40, dtype=torch.float64), atol=1e-12)


def random_parts(count: int, *, labelled: bool) -> Decomposition:
    generator = torch.Generator().manual_seed(count)
    parts = torch.randn(5, count, generator=generator, dtype=torch.float64).unbind()
    return Decomposition(*parts[:4], torch.zeros(count), parts[4] if labelled else None)


def every_sample(count: int) -> tuple[Predicted, torch.Tensor]:
    numbers = torch.arange(count)
    return Predicted(numbers, numbers, count), numbers


def pieces(parts: Decomposition, start: int, stop: int) -> Decomposition:
    return Decomposition(*(None if each is None else each[start:stop] for each in vars(parts).values()))


def test_means_and_intervals_are_students_for_samples() -> None:
    parts = random_parts(50, labelled=True)
    sums, others = (DecompositionSums.empty(labelled=True) for _ in range(2))
    sums.add(pieces(parts, 0, 20), *every_sample(20))
    others.add(pieces(parts, 20, 50), every_sample(30)[0], torch.arange(20, 50))
    sums.merge(others.cpu())
    for name, found in sums.statistics().items():
        values = getattr(parts, name).numpy()
        assert found.mean == pytest.approx(values.mean())
        assert found.std == pytest.approx(values.std(ddof=1))
        assert found.interval == pytest.approx(stats.t.interval(0.95, 49, values.mean(), stats.sem(values)))
    positive = np.sort(np.maximum(parts.barrier.numpy(), 0))[::-1].cumsum()
    carriers = round(50 * sums.half_share)
    assert positive[carriers - 1] >= positive[-1] / 2 > positive[carriers - 2]


def test_tokens_of_one_text_are_no_independent_samples() -> None:
    """Texts of 1 to 8 tokens with one value each: the error is that of texts, not of tokens."""
    generator = np.random.default_rng(0)
    counts, values = generator.integers(1, 9, 400), generator.standard_normal(400)
    samples, tokens = torch.tensor(np.repeat(np.arange(400), counts)), torch.tensor(np.repeat(values, counts))
    sums = DecompositionSums.empty(labelled=False)
    sums.add(Decomposition(*[tokens] * 5), Predicted(samples, samples, 400), torch.arange(400))
    found = sums.statistics()["gain"]
    assert found.mean == pytest.approx(float(tokens.mean()))
    drawn = generator.integers(400, size=(2000, 400))
    resampled = (counts[drawn] * values[drawn]).sum(1) / counts[drawn].sum(1)
    assert found.std / 20 == pytest.approx(resampled.std(), rel=0.08)
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.966 * found.std / 20, rel=1e-3)


def test_one_sample_has_no_interval() -> None:
    sums = DecompositionSums.empty(labelled=False)
    sums.add(random_parts(1, labelled=False), *every_sample(1))
    assert list(sums.statistics()) == ["gain", "divergence", "estimate", "bound"]
    assert all(each.std is each.interval is None for each in sums.statistics().values())


def test_no_sample_carries_a_barrier_that_is_nowhere() -> None:
    sums = DecompositionSums.empty(labelled=False)
    assert sums.half_share is None
    zeros = torch.zeros(3, dtype=torch.float64)
    sums.add(Decomposition(zeros + 1, zeros, zeros, zeros, zeros), *every_sample(3))
    assert sums.half_share is None
