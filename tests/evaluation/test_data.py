import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data
from tests.evaluation.tiny_data import PerceptronConfig, pixel_rows, text_rows, vector_rows, word_tokenizer
from tests.tiny_models import tiny_config

BYTE_MODEL = GPT2Config(vocab_size=256, n_positions=64)


def load(task, rows, model_config, source=None, **settings):
    return load_evaluation_data(EvaluationConfig(task=task, dataset=rows, **settings), source, model_config)


def classification(**settings):
    return load("text-classification", text_rows(), tiny_config("bert"), word_tokenizer(), **settings)


TASKS = {
    "text-classification": lambda **settings: classification(**settings),
    "fill-mask": lambda **settings: load("fill-mask", text_rows(), tiny_config("bert"), word_tokenizer(), **settings),
    "text-generation": lambda **settings: load(
        "text-generation", text_rows(), BYTE_MODEL, tokenizer="bytes", max_length=16, **settings
    ),
    "text-generation-rows": lambda **settings: load(
        "text-generation", text_rows(), BYTE_MODEL, tokenizer="bytes", blocks=False, **settings
    ),
    "image-classification": lambda **settings: load(
        "image-classification", pixel_rows(), tiny_config("resnet-basic"), **settings
    ),
}


def samples(data, rank=0, world=1):
    """Every sample without its padding, by its id."""
    found = {}
    for batch, sample_ids in data.batches(rank, world):
        for index, sample_id in enumerate(sample_ids.tolist()):
            assert sample_id not in found
            length = int(batch["attention_mask"][index].sum()) if "attention_mask" in batch else None
            found[sample_id] = {}
            for name, value in batch.items():
                row = value[index]
                if length is not None and value.dim() == 2:
                    if name == "labels":
                        assert (row[length:] == -100).all()
                    row = row[:length]
                found[sample_id][name] = row.tolist()
    return found


@pytest.mark.parametrize("task", TASKS)
def test_batches_and_processes_change_no_sample(task):
    whole = samples(TASKS[task](batch_size=7))
    assert samples(TASKS[task](batch_size=1)) == whole
    data = TASKS[task](batch_size=3)
    shards = [samples(data, rank, 3) for rank in range(3)]
    assert sum(map(len, shards)) == len(data) == len(whole)
    assert {key: value for shard in shards for key, value in shard.items()} == whole
    assert [data.batch_count(rank, 3) for rank in range(3)] == [len(list(data.batches(rank, 3))) for rank in range(3)]
    unlabelled = TASKS[task](labels=False)
    assert not unlabelled.labelled
    assert unlabelled.metrics == {}
    assert all("labels" not in sample for sample in samples(unlabelled).values())


@pytest.mark.parametrize("task", TASKS)
def test_a_subset_is_part_of_the_whole(task):
    whole = samples(TASKS[task](seed=1))
    part = samples(TASKS[task](seed=1, samples=5))
    assert len(part) == 5
    assert all(whole[sample_id] == sample for sample_id, sample in part.items())
    assert set(part) != set(samples(TASKS[task](seed=2, samples=5)))


def test_text_classification_is_what_the_tokenizer_gives():
    rows, tokenizer = text_rows(), word_tokenizer()
    found = samples(classification())
    for index, row in enumerate(rows):
        assert found[index]["input_ids"] == tokenizer(row["text"])["input_ids"]
        assert found[index]["labels"] == row["label"]


def test_pairs_of_texts():
    rows = text_rows().rename_column("text", "first").add_column("second", ["w1 w2"] * 23)
    data = load(
        "text-classification",
        rows,
        tiny_config("bert"),
        word_tokenizer(),
        text_column="first",
        text_pair_column="second",
    )
    tokenizer = word_tokenizer()
    assert samples(data)[4]["input_ids"] == tokenizer(rows[4]["first"], "w1 w2")["input_ids"]
    with pytest.raises(EvaluationError, match=r"no column 'third' \(text_pair_column"):
        load(
            "text-classification",
            rows,
            tiny_config("bert"),
            word_tokenizer(),
            text_column="first",
            text_pair_column="third",
        )


def test_blocks_are_the_joined_text_cut_without_loss():
    rows = datasets.Dataset.from_dict({"text": ["naïve", "abc", "0123456789"]})
    whole = "naïve\nabc\n0123456789".encode()
    data = load("text-generation", rows, BYTE_MODEL, tokenizer="bytes", max_length=8)
    found = samples(data)
    assert b"".join(bytes(found[block]["input_ids"]) for block in range(3)) == whole
    assert [len(found[block]["input_ids"]) for block in range(3)] == [8, 8, 5]
    assert all(sample["labels"] == sample["input_ids"] for sample in found.values())
    # The first byte of a block is given, all others are predicted.
    assert data.byte_count == len(whole) - 3
    assert data.summary["tokens"] == len(whole)
    assert load("text-generation", rows, BYTE_MODEL, tokenizer="bytes", max_length=20).byte_count == 19


def test_rows_of_a_language_model_are_truncated_and_counted(caplog):
    rows = datasets.Dataset.from_dict({"text": ["0123456789", "abc"]})
    data = load("text-generation", rows, BYTE_MODEL, tokenizer="bytes", max_length=8, blocks=False)
    assert bytes(samples(data)[0]["input_ids"]) == b"01234567"
    assert data.byte_count == 7 + 2
    assert data.summary["truncated"] == 1
    assert "1 of 2 samples are longer than max_length 8 and were truncated" in caplog.text


def test_rows_are_joined_by_the_end_of_text_token():
    tokenizer = word_tokenizer(eos_token="[SEP]")
    rows = datasets.Dataset.from_dict({"text": ["w1 w2", "w3"]})
    data = load("text-generation", rows, tiny_config("gpt2"), tokenizer, max_length=30)
    ids = [*tokenizer("w1 w2")["input_ids"], *tokenizer("w3")["input_ids"]]
    assert samples(data)[0]["input_ids"] == ids
    assert data.byte_count == len("w1 w2") + len("w3")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: load_empty("text-generation", blocks=False), "fewer than two tokens: row 0, 2", id="rows"),
        pytest.param(lambda: load_empty("text-generation"), "is empty; give data", id="blocks"),
        pytest.param(
            lambda: load_empty("text-classification"), "2 of 3 samples cannot .* are empty: row 0, 2", id="text"
        ),
    ],
)
def test_empty_samples_are_named_before_anything_runs(make, message):
    with pytest.raises(EvaluationError, match=message):
        make()


def load_empty(task, **settings):
    texts = ["", "" if settings == {} and task == "text-generation" else "ab", ""]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0, 1, 0]})
    if settings == {} and task == "text-generation":
        rows = rows.select([0])
    return load(task, rows, BYTE_MODEL, tokenizer="bytes", batch_size=1, **settings)


def test_a_text_that_is_none_is_named():
    rows = datasets.Dataset.from_dict({"text": ["w1", None], "label": [0, 1]})
    with pytest.raises(EvaluationError, match="row 1 of column 'text' holds None instead of text"):
        load("text-classification", rows, tiny_config("bert"), word_tokenizer())


def test_nothing_but_special_tokens_cannot_be_masked():
    rows = datasets.Dataset.from_dict({"text": ["w1", " "]})
    with pytest.raises(EvaluationError, match="no token that could be masked: row 1"):
        load("fill-mask", rows, tiny_config("bert"), word_tokenizer())


def test_a_foreign_tokenizer_is_noticed_before_anything_runs():
    config = tiny_config("bert")
    config.vocab_size = 20
    with pytest.raises(EvaluationError, match="the tokenizer belongs to another model"):
        load("text-classification", text_rows(), config, word_tokenizer())


def test_heads_that_are_no_classifier_are_refused():
    for change in ({"problem_type": "multi_label_classification"}, {"num_labels": 1}):
        config = tiny_config("bert")
        config.update(change)
        with pytest.raises(EvaluationError, match="only single-label classification"):
            load("text-classification", text_rows(), config, word_tokenizer())
        load("text-classification", text_rows(), config, word_tokenizer(), labels=False)


def test_metrics_are_checked_before_anything_runs():
    for settings, message in (
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"metric": "perplexity"}, "'perplexity' is not one for classification"),
        ({"metric": "f1", "labels": False}, "metric 'f1' needs labels"),
        ({"metric": "f1"}, "class 1 of two, and the model has 5 classes; use macro_f1"),
    ):
        with pytest.raises(EvaluationError, match=message):
            classification(**settings)
    assert list(classification(metric=["macro_f1", "accuracy"]).metrics) == ["accuracy", "macro_f1"]
    for task, expected in (
        ("fill-mask", ["token_accuracy", "perplexity"]),
        ("text-generation", ["token_accuracy", "perplexity", "bits_per_byte"]),
    ):
        assert list(TASKS[task]().metrics) == expected
    with pytest.raises(EvaluationError, match="'bits_per_byte' is for text generation"):
        TASKS["fill-mask"](metric="bits_per_byte")


def test_images_of_every_form_are_the_same_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 5), dtype=np.uint8)
    labels = {"label": [0, 1, 2, 3]}
    arrays = datasets.Features({"image": datasets.Array2D((5, 5), "uint8"), "label": datasets.Value("int64")})
    config = tiny_config("resnet-basic")
    config.num_channels = 1
    forms = [
        datasets.Dataset.from_dict({"image": pixels, **labels}, features=arrays),
        datasets.Dataset.from_dict({"image": pixels.tolist(), **labels}),
        datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels], **labels}),
    ]
    expected = torch.from_numpy(pixels)[:, None] / 255
    for rows in forms:
        ((batch, sample_ids),) = load("image-classification", rows, config).batches()
        assert torch.equal(batch["pixel_values"], expected[sample_ids])
        assert batch["labels"].tolist() == sample_ids.tolist()


def test_a_users_own_model_takes_vectors():
    data = load("image-classification", vector_rows(), PerceptronConfig(num_labels=5))
    ((batch, sample_ids),) = data.batches()
    assert batch["pixel_values"].shape == (23, 12)
    first = vector_rows()[int(sample_ids[0])]
    assert batch["pixel_values"][0].tolist() == np.float32(first["pixel_values"]).tolist()
    assert batch["labels"][0] == first["label"]


def test_images_that_do_not_fit_are_named():
    rows = datasets.Dataset.from_dict({"image": [Image.new("L", (3, 3)), Image.new("L", (4, 4))], "label": [0, 1]})
    with pytest.raises(
        EvaluationError, match="column 'image', in a batch of rows between 0 and 1: images have different"
    ):
        load("image-classification", rows, tiny_config("resnet-basic"))
