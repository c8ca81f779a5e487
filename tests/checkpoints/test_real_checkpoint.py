"""A real checkpoint as it was published: opened, compared with what transformers makes of it, written, read again."""

import pytest
import torch
import transformers

from hf_llfc.checkpoints import compare, load_model, open_checkpoint, write_checkpoint
from hf_llfc.checkpoints.companions import by_name
from tests.real_data import minilm

pytestmark = pytest.mark.slow


def test_all_minilm_is_read_and_written_whole(tmp_path):
    checkpoint = open_checkpoint(minilm())
    assert (checkpoint.architecture, len(checkpoint.tensors)) == ("BertModel", 103)
    expected = transformers.AutoModel.from_pretrained(minilm())
    loaded = load_model(checkpoint)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())

    write_checkpoint(
        tmp_path,
        checkpoint.tensors,
        checkpoint.state_dict(),
        config=checkpoint.config,
        companions=by_name(checkpoint.companion_files),
        max_shard_size=30 * 10**6,
    )
    written = open_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert written.fingerprint() == checkpoint.fingerprint()
    assert compare([checkpoint, written, open_checkpoint(expected)]) == []
    model, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("Layerwise linear feature connectivity", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)
