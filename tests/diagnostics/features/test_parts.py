import pytest

from hf_llfc.diagnostics.features.parts import find_parts
from hf_llfc.diagnostics.rows import AFTER, BEFORE
from tests.diagnostics.pairs import data_of, pair

PARTS = {
    "bert": [BEFORE, *(f"bert.encoder.layer.{i}" for i in range(2)), AFTER],
    "llama-tied": [BEFORE, "model.layers.0", "model.layers.1", AFTER],
    "vit": [BEFORE, "vit.layers.0", "vit.layers.1", AFTER],
    "bart": [BEFORE, *(f"model.{side}coder.layers.{i}" for side in ("en", "de") for i in range(2)), AFTER],
    "perceptron": ["layers.0", "layers.1", "layers.2", "head"],
}


@pytest.mark.parametrize("family", list(PARTS))
def test_every_weight_belongs_to_the_part_in_which_it_runs_first(family):
    model, _ = pair(family)
    batch, _ = next(data_of(family, model.config).batches())
    parts = find_parts(model, batch)
    assert [part.name for part in parts] == PARTS[family]
    owned = [name for part in parts for name in part.tensors]
    floating = {
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_floating_point()
    }
    assert sorted(owned) == sorted(floating)
    for part in parts:
        if part.name not in (BEFORE, AFTER):
            assert all(name.startswith(f"{part.name}.") for name in part.tensors)
    assert all(part.starts is not None for part in parts[1:])


def test_a_shared_head_runs_first_as_the_embedding():
    model, _ = pair("llama-tied")
    parts = find_parts(model, next(data_of("llama-tied", model.config).batches())[0])
    assert "model.embed_tokens.weight" in parts[0].tensors
    assert parts[-1].tensors == ("model.norm.weight",)


def test_a_block_that_runs_again_has_no_place_to_start_from():
    model, _ = pair("albert")
    parts = find_parts(model, next(data_of("albert", model.config).batches())[0])
    assert all(part.starts is None and part.input is None for part in parts)
