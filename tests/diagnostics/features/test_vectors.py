"""One vector a sample: at the tokens that the head reads, or the mean over all places."""

import numpy as np
import pytest
import torch

from hf_llfc.diagnostics.features.layers import handing_over, select_layers
from hf_llfc.diagnostics.features.vectors import sample_vectors_of
from hf_llfc.diagnostics.streaming import attention_mask
from hf_llfc.evaluation.models import evaluation_mode, forward_logits
from tests.diagnostics.pairs import data_of, pair, precise, samples_of, tensors_of

READS = {
    "bert": "first",
    "vit": "first",
    "gpt2": "last",
    "bart": "last",
    "resnet-basic": "all",
    "grouped": "all",
    "perceptron": "all",
}


def of_one_sample(features, reads):
    """The vector of a sample that was run alone; channels are the second dimension of images, else the last."""
    places = features[0] if features.ndim < 4 else np.moveaxis(features[0], 0, -1)
    if reads == "all":
        return places.reshape(-1, places.shape[-1]).mean(axis=0)
    return places[0 if reads == "first" else -1]


@pytest.mark.parametrize("family", READS)
def test_vectors_are_those_of_every_sample_alone(family):
    model, _ = pair(family)
    data = data_of(family, model.config, batch_size=11)
    batch, sample_ids = next(data.batches())
    found = {}
    with precise(torch.float64), evaluation_mode(model):
        layers = [layer for layer in select_layers(model, batch) if "[" not in layer.label]
        vectors = sample_vectors_of(model, batch, layers, "test")
        mask = attention_mask(batch, sample_ids, layers, model.device)
        with handing_over(model, layers, lambda i, t: found.update({i: vectors[i].of(t, len(sample_ids), mask)})):
            logits = forward_logits(model, batch)
    assert torch.equal(vectors[-1].of(logits, len(sample_ids), mask), logits)
    inner = layers[:-1]
    if inner and family != "grouped":
        assert {each.reads for each in vectors[:-1]} == {READS[family]}
    kept = tensors_of(model, samples_of(data, torch.float64), [layer.module for layer in inner])
    order = {int(number): place for place, number in enumerate(data.sample_ids)}
    for index, layer in enumerate(inner):
        expected = [of_one_sample(kept[layer.module][order[int(s)]][0], READS[family]) for s in sample_ids]
        assert np.allclose(found[index], np.stack(expected), rtol=1e-9, atol=1e-9)


def test_a_sample_of_one_token_hides_nothing_of_what_is_read():
    model, _ = pair("gpt2")
    data = data_of("gpt2", model.config)
    batch, _ = next(data.batches())
    short = {name: value[:1, :1] if value.dim() > 1 else value[:1] for name, value in batch.items()}
    with precise(torch.float64), evaluation_mode(model):
        layers = select_layers(model, short)
        assert [each.reads for each in sample_vectors_of(model, short, layers, "test")] == ["last", "last", "all"]
