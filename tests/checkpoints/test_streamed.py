"""A diagnosis with weights that are read when a module runs says what one in memory says."""

import pytest
import torch

import hf_llfc
from hf_llfc.checkpoints import load_model, open_checkpoint
from hf_llfc.checkpoints.streamed import StreamedModel
from hf_llfc.errors import LLFCError
from hf_llfc.evaluation import EvaluationConfig
from tests.diagnostics.test_diagnose import numbers
from tests.runs import byte_llama, image_data, moved, saved, small_resnet, text_data
from tests.tiny_models import TINY, FullDouble, tiny_inputs, tiny_model

WITHOUT_BATCH_NORM = [row for row in TINY if "resnet" not in row[0]]


@pytest.mark.parametrize(("family", "head"), WITHOUT_BATCH_NORM)
def test_a_streamed_model_answers_as_one_in_memory(family, head):
    checkpoints = [open_checkpoint(tiny_model(family, head, seed, torch.float64)) for seed in (0, 1)]
    readers = [checkpoint.read for checkpoint in checkpoints]
    inputs = tiny_inputs(tiny_model(family, head, 0, torch.float64))
    with torch.no_grad(), FullDouble():
        for weights, place in (((1.0, 0.0), 0), ((0.0, 1.0), 1)):
            streamed = StreamedModel(checkpoints[0], readers, weights)
            expected = load_model(checkpoints[place]).eval()(**inputs)
            assert torch.equal(streamed.model(**inputs)[0], expected[0])
            assert streamed.model.device == torch.device("cpu")
            assert all(parameter.is_meta for parameter in streamed.model.parameters())
        streamed.move_to((0.25, 0.75))
        state = {
            name: 0.25 * checkpoints[0].read(name) + 0.75 * checkpoints[1].read(name)
            if info.dtype.is_floating_point
            else checkpoints[0].read(name)
            for name, info in checkpoints[0].tensors.items()
        }
        expected = load_model(checkpoints[0], state_dict=state).eval()(**inputs)
        torch.testing.assert_close(streamed.model(**inputs)[0], expected[0], rtol=1e-9, atol=1e-11)


def test_the_report_is_that_of_models_in_memory(tmp_path):
    pair = saved(byte_llama(0), tmp_path / "a"), saved(moved(byte_llama(1), 2), tmp_path / "b")
    data = EvaluationConfig(task="text-generation", dataset=str(text_data(tmp_path)), tokenizer="bytes", max_length=32)
    options = {"align": "weight_matching", "alphas": [0.25, 0.5]}
    in_memory, streamed = (hf_llfc.diagnose(*pair, data, **options, offload=offload) for offload in (False, True))
    assert numbers(streamed) == pytest.approx(numbers(in_memory), rel=1e-5, abs=1e-6)
    with pytest.raises(LLFCError, match="leave out measures"):
        hf_llfc.diagnose(*pair, data, offload=True, measures=["geometry"])


def test_batch_normalization_is_refused(tmp_path):
    pair = saved(small_resnet(0), tmp_path / "a"), saved(small_resnet(1), tmp_path / "b")
    data = EvaluationConfig(task="image-classification", dataset=str(image_data(tmp_path)))
    with pytest.raises(LLFCError, match="batch normalization cannot be streamed"):
        hf_llfc.diagnose(*pair, data, offload=True)
