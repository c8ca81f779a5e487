"""May these be merged? Every reason against it, all at once, and none where there is none."""

import json

import pytest
import torch
import transformers

from hf_llfc.checkpoints import compare, open_checkpoint
from tests.checkpoints.conftest import WORDS, save_tokenizer
from tests.tiny_models import tiny_config, tiny_model


def model(family="bert", head="sequence-classification", **changes):
    config = tiny_config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    return open_checkpoint(type(tiny_model(family, head))(config))


def test_equal_architectures_fit_whatever_their_weights_and_bookkeeping():
    first = model()
    others = [
        model(),
        model(hidden_dropout_prob=0.5, initializer_range=1.0, pad_token_id=3, use_cache=False),
        model(max_position_embeddings=first.config.max_position_embeddings),
        open_checkpoint(tiny_model("bert", "sequence-classification", dtype=torch.bfloat16)),
    ]
    assert compare([first, *others]) == []
    assert compare([first]) == []
    assert compare([]) == []


def test_another_model_type_says_it_all():
    (problem,) = compare([model(), model("roberta")])
    assert problem.endswith("the model type is roberta, but that of BertForSequenceClassification is bert")


def test_another_head_is_named():
    (problem,) = compare([model(), model(head="masked-lm")])
    assert (
        "BertForMaskedLM: the architecture is BertForMaskedLM, but that of BertForSequenceClassification is" in problem
    )


def test_other_sizes_are_named_by_config_and_tensor():
    problems = compare([model(), model(intermediate_size=44)])
    assert problems[0].endswith(
        "intermediate_size in the config is 44, but in that of BertForSequenceClassification 40"
    )
    assert "bert.encoder.layer.0.intermediate.dense.weight [44, 24] against [40, 24]" in problems[1]
    assert len(problems) == 2


def test_values_that_change_what_is_computed_without_changing_a_shape_are_named():
    problems = compare([model(), model(num_attention_heads=4, hidden_act="relu", layer_norm_eps=1e-5)])
    assert [problem.split(": ")[1].split(" in the config")[0] for problem in problems] == [
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
    ]


def test_values_inside_a_value_are_compared():
    rope = dict(tiny_config("llama").rope_parameters) | {"rope_theta": 5e5}
    (problem,) = compare([model("llama", "causal-lm"), model("llama", "causal-lm", rope_parameters=rope)])
    assert "rope_parameters.rope_theta in the config is 500000.0, but in that of LlamaForCausalLM 10000.0" in problem


def test_more_layers_are_named_with_a_count():
    problems = compare([model(), model(num_hidden_layers=3)])
    assert "num_hidden_layers in the config is 3" in problems[0]
    assert "has 16 tensors bert.encoder.layer.2.attention.output.LayerNorm.bias" in problems[1]
    assert problems[1].endswith("and 11 more, which BertForSequenceClassification lacks")
    problems = compare([model(num_hidden_layers=3), model()])
    assert "lacks 16 tensors" in problems[1]


def test_each_model_is_compared_with_the_first():
    problems = compare([model(), model(hidden_act="relu"), model(hidden_act="silu"), model()])
    assert len(problems) == 2


def test_classes_in_another_order_are_named():
    first = model(id2label={0: "negative", 1: "positive"})
    (problem,) = compare([first, model(id2label={0: "positive", 1: "negative"})])
    assert "class 0 is 'positive', but that of BertForSequenceClassification is 'negative'" in problem
    assert compare([first, model(id2label={0: "LABEL_0", 1: "LABEL_1"})]) == []
    assert compare([first, model(id2label={0: "Negative", 1: "POSITIVE"})]) == []
    assert compare([model(head="masked-lm", id2label={0: "a", 1: "b"}), model(head="masked-lm")]) == []


def test_other_kinds_of_numbers_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("a", "b"):
        tiny_model("bert", "base").save_pretrained(tmp_path / name)
    path = tmp_path / "b" / "model.safetensors"
    save_file(load_file(path) | {"pooler.dense.bias": torch.zeros(24, dtype=torch.int32)}, path)
    (problem,) = compare([open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")])
    assert "other kinds of numbers" in problem
    assert "pooler.dense.bias torch.int32 against torch.float32" in problem


def test_a_tensor_in_only_one_file_that_the_class_does_not_use_forbids_nothing(save):
    from safetensors.torch import load_file, save_file

    first, other = save("a"), save("b")
    path = other / "model.safetensors"
    save_file(load_file(path) | {"probe.weight": torch.ones(2)}, path)
    assert compare([open_checkpoint(first), open_checkpoint(other)]) == []


# -- vocabularies


def test_other_vocabularies_are_named_with_sizes_and_tokens(save):
    first, other = save("a"), save("b")
    save_tokenizer(other, [*WORDS[:4], "bad", "good", "film", "plot"])
    (problem,) = compare([open_checkpoint(first), open_checkpoint(other)])
    assert problem == (
        f"{other}: the vocabulary has 8 tokens and differs from that of {first} with 7 in 3: id 4 is 'bad' against"
        " 'good', id 5 is 'good' against 'bad', id 7 is 'plot' against missing; only models that share a tokenizer"
        " can be merged as they are; a recipe or merge with tokenizer_source: union unites the vocabularies"
    )


def test_only_the_first_differing_tokens_are_listed(save):
    first, other = save("a"), save("b")
    save_tokenizer(other, ["[PAD]", "[UNK]", *(f"word{index}" for index in range(100))])
    (problem,) = compare([open_checkpoint(first), open_checkpoint(other)])
    assert "has 102 tokens" in problem and "with 7 in 100: " in problem
    assert "id 2 is 'word0' against '[CLS]'" in problem and "id 7" not in problem


def test_an_added_token_counts(save):
    first, other = save("a"), save("b")
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    (problem,) = compare([open_checkpoint(first), open_checkpoint(other)])
    assert "id 7 is '<new>' against missing" in problem


def test_vocabularies_in_older_files_are_compared_with_new_ones(save):
    first, older, other = save("a"), save("b"), save("c")
    for folder, words in ((older, WORDS), (other, [*WORDS[:-1], "plot"])):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        assert "vocab.txt" in {path.name for path in open_checkpoint(folder).companion_files}
    problems = compare([open_checkpoint(folder) for folder in (first, older, other)])
    extra = set(transformers.AutoTokenizer.from_pretrained(older).get_vocab()) - set(WORDS)
    assert len(problems) == 1 + bool(extra)
    assert "id 6 is 'plot' against 'film'" in problems[-1]


def test_a_missing_or_broken_tokenizer_forbids_nothing(save, caplog):
    first, without, broken = save("a"), save("b"), save("c")
    (without / "tokenizer.json").unlink()
    (broken / "tokenizer.json").write_text("{")
    assert compare([open_checkpoint(folder) for folder in (first, without, broken)]) == []
    assert f"{broken}: the tokenizer cannot be read, so the vocabularies are not compared" in caplog.text


@pytest.mark.parametrize("both", [True, False])
def test_tokens_of_one_id_are_compared_in_one_order(save, both):
    folders = [save("a"), save("b")]
    for folder in folders[: 1 + both]:
        data = json.loads((folder / "tokenizer.json").read_text())
        data["model"]["vocab"]["twin"] = 6
        (folder / "tokenizer.json").write_text(json.dumps(data))
    assert bool(compare([open_checkpoint(folder) for folder in folders])) != both
