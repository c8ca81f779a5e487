import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.encoding import (
    IGNORED_LABEL,
    ByteEncoder,
    PlainImageEncoder,
    ProcessorEncoder,
    TokenRow,
    check_vocabulary,
    collate,
    load_image_encoder,
    load_text_encoder,
    mask_tokens,
)
from hf_llfc.recipe.data import EvaluationConfig
from tests.evaluation.tiny_data import SPECIAL, sentences, word_tokenizer
from tests.tiny_models import tiny_config

TEXTS = ["plain words", "naïve café ✓ 你好", "  two  spaces ", "", "🙂🙂"]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, whose tokens cut characters apart."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    backend.train_from_iterator(["plain words and naïve café ✓ 你好"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def config_for(task="text-classification", **settings) -> EvaluationConfig:
    return EvaluationConfig(task=task, dataset="rows.csv", **settings)


def test_bytes_are_the_tokens_of_a_byte_level_model():
    encoder = ByteEncoder(max_length=8, pad_id=0)
    for text, row in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        whole = text.encode("utf-8")
        assert bytes(row.ids.tolist()) == whole[:8]
        assert row.byte_counts.tolist() == [1] * len(row.ids)
        assert row.truncated == (len(whole) > 8)
        assert not row.special.any()
    assert bytes(encoder.encode(["a"], ["b"])[0].ids.tolist()) == b"a\nb"
    assert bytes(encoder.encode([TEXTS[0]], truncate=False)[0].ids.tolist()) == b"plain words"


def test_tokens_share_out_all_bytes_of_the_text():
    encoder = load_text_encoder(config_for(), byte_level_tokenizer(), BertConfig(vocab_size=300))
    for text, row in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        assert row.byte_counts.sum() == len(text.encode("utf-8"))
        assert (row.byte_counts >= 0).all()
        tokens = encoder.tokenizer.convert_ids_to_tokens(row.ids.tolist())
        if text == "plain words":
            assert row.byte_counts.tolist() == [len(token) for token in tokens]


def test_special_tokens_have_no_bytes_and_a_cut_is_noticed():
    encoder = load_text_encoder(config_for(max_length=5), word_tokenizer(), tiny_config("bert"))
    short, long = encoder.encode(["w1 w22", "w1 w2 w3 w4 w5"])
    assert short.special.tolist() == [True, False, False, True]
    assert short.byte_counts.tolist() == [0, 2, 4, 0]
    assert (short.truncated, long.truncated) == (False, True)
    assert len(long.ids) == 5
    (pair,) = encoder.encode(["w1"], ["w2"])
    assert len(pair.ids) == 5
    assert pair.types is None or set(pair.types) <= {0, 1}


def test_the_length_is_what_model_and_tokenizer_allow():
    model = tiny_config("bert")
    assert load_text_encoder(config_for(), word_tokenizer(), model).max_length == 30
    assert load_text_encoder(config_for(), word_tokenizer(model_max_length=99), model).max_length == 37
    assert load_text_encoder(config_for(max_length=9), word_tokenizer(), model).max_length == 9
    with pytest.raises(EvaluationError, match="max_length is 38, but the model has 37 positions"):
        load_text_encoder(config_for(max_length=38), word_tokenizer(), model)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    small = tiny_config("bert")
    for config, source, message in (
        (config_for(), None, "comes without a tokenizer; name one as tokenizer, or use tokenizer: bytes"),
        (config_for(), tmp_path / "bert", "has no vocabulary"),
        (config_for(), tmp_path / "empty", "no tokenizer can be loaded"),
        (config_for("fill-mask"), word_tokenizer(mask_token=None), "no mask token"),
        (config_for("fill-mask", tokenizer="bytes"), None, "vocabulary of at least 256, the model has 61"),
    ):
        with pytest.raises(EvaluationError, match=message):
            load_text_encoder(config, source, small)
    with pytest.raises(EvaluationError, match="bytes has no mask token"):
        load_text_encoder(config_for("fill-mask", tokenizer="bytes"), None, BertConfig(vocab_size=256))
    rows = [TokenRow(np.array([3, 61]), None, np.zeros(2, dtype=bool), None, False)]
    with pytest.raises(EvaluationError, match="token id 61, but the model's vocabulary has 61"):
        check_vocabulary(rows, small)


def test_without_any_padding_token_a_batch_is_one_text():
    model = tiny_config("gpt2")
    model.pad_token_id = None
    tokenizer = word_tokenizer(pad_token=None)
    with pytest.raises(EvaluationError, match="set batch_size to 1"):
        load_text_encoder(config_for(), tokenizer, model)
    load_text_encoder(config_for(batch_size=1), tokenizer, model)
    load_text_encoder(config_for("text-generation"), tokenizer, model)


def test_a_batch_is_padded_on_the_right():
    tokens = [np.array([5, 6, 7]), np.array([8])]
    rows = [TokenRow(ids, np.ones_like(ids), np.zeros(len(ids), dtype=bool), None, False) for ids in tokens]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]


def masked(row, sample_id=3, seed=0, fraction=0.15):
    return mask_tokens(
        row, sample_id=sample_id, seed=seed, fraction=fraction, mask_id=SPECIAL.index("[MASK]"), vocabulary=45
    )


def test_masking_depends_on_sample_and_seed_alone():
    encoder = load_text_encoder(config_for("fill-mask"), word_tokenizer(), tiny_config("bert"))
    rows = encoder.encode(sentences(40))
    choices = set()
    for sample_id, row in enumerate(rows):
        shown, labels = masked(row, sample_id)
        again, labels_again = masked(row, sample_id)
        assert shown.ids.tolist() == again.ids.tolist()
        assert labels.tolist() == labels_again.tolist()
        predicted = labels != IGNORED_LABEL
        assert predicted.sum() == max(1, round(0.15 * (~row.special).sum()))
        assert not (predicted & row.special).any()
        assert (labels[predicted] == row.ids[predicted]).all()
        assert (shown.ids[~predicted] == row.ids[~predicted]).all()
        choices.add(tuple(np.flatnonzero(predicted)))
    assert len(choices) > 5
    assert any(masked(row, 0)[1].tolist() != masked(row, 0, seed=1)[1].tolist() for row in rows)


def test_four_fifths_of_the_predicted_tokens_are_hidden_and_a_tenth_is_exchanged():
    ids = np.full(4000, 7)
    row = TokenRow(ids, None, np.zeros(4000, dtype=bool), None, False)
    shown, labels = masked(row, fraction=1.0)
    assert (labels == 7).all()
    hidden, kept = (shown.ids == SPECIAL.index("[MASK]")).mean(), (shown.ids == 7).mean()
    assert hidden == pytest.approx(0.8, abs=0.03)
    assert kept == pytest.approx(0.1, abs=0.03)


def test_plain_images():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colour = np.stack([grey, grey + 1, grey + 2], axis=-1)
    one = PlainImageEncoder(channels=1, rescale_factor=None, integers=False)
    assert torch.equal(one.encode([Image.fromarray(grey)]), torch.from_numpy(grey)[None, None] / 255)
    three = PlainImageEncoder(channels=3, rescale_factor=None, integers=False)
    assert torch.equal(three.encode([Image.fromarray(colour)])[0, 2], torch.from_numpy(grey + 2) / 255)
    assert three.encode([Image.fromarray(grey)]).shape == (1, 3, 3, 4)
    unknown = PlainImageEncoder(channels=None, rescale_factor=None, integers=True)
    assert torch.equal(unknown.encode([grey.ravel()]), torch.from_numpy(grey.ravel())[None] / 255)
    assert unknown.encode([grey, grey]).shape == (2, 3, 4)
    floats = PlainImageEncoder(channels=1, rescale_factor=None, integers=False)
    assert torch.equal(floats.encode([grey.astype(float)])[0, 0], torch.from_numpy(grey).float())
    sixteenth = PlainImageEncoder(channels=1, rescale_factor=1 / 16, integers=True)
    assert torch.equal(sixteenth.encode([grey])[0, 0], torch.from_numpy(grey) / 16)
    with pytest.raises(EvaluationError, match=r"different shapes \(\(1, 3, 4\), \(1, 4, 3\)\)"):
        one.encode([grey, grey.T])


def test_the_models_own_processor(tmp_path):
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(tmp_path)
    model = tiny_config("vit")
    encoder = load_image_encoder(config_for("image-classification"), tmp_path, model, integers=False)
    assert isinstance(encoder, ProcessorEncoder)
    grey = np.full((6, 6), 51, dtype=np.uint8)
    expected = torch.full((3, 6, 6), (0.2 - 0.5) / 0.25)
    for image in (Image.fromarray(grey), grey, np.stack([grey] * 3), np.stack([grey] * 3, axis=-1)):
        assert torch.allclose(encoder.encode([image])[0], expected, atol=1e-6)
    with pytest.raises(EvaluationError, match="whole numbers from 0 to 255"):
        encoder.encode([grey / 255])
    with pytest.raises(EvaluationError, match="an image is missing"):
        encoder.encode([None])
    with pytest.raises(EvaluationError, match="rescale_factor is for models without"):
        load_image_encoder(config_for("image-classification", rescale_factor=1.0), tmp_path, model, integers=False)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        load_image_encoder(config_for("image-classification"), tmp_path, model, integers=False)


def test_a_folder_without_a_processor_means_plain_pixels(tmp_path):
    model = tiny_config("resnet-basic")
    for source in (tmp_path, None):
        encoder = load_image_encoder(config_for("image-classification"), source, model, integers=True)
        assert encoder == PlainImageEncoder(channels=3, rescale_factor=None, integers=True)
