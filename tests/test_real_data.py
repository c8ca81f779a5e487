"""The real inputs are what the numbers in benchmarks/RESULTS.md were measured on."""

import numpy as np
import pytest

from tests import real_data

pytestmark = pytest.mark.slow


def test_minilm_is_a_checkpoint():
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in real_data.minilm().iterdir()
    }


@pytest.mark.parametrize("domain", real_data.SENTIMENT_DOMAINS)
def test_sentiment_has_both_labels_in_every_domain(domain):
    dataset = real_data.sentiment(domain)
    assert len(dataset) == real_data.SENTIMENT_SIZES[domain]
    assert 0.3 < np.mean(dataset["label"]) < 0.7
    assert min(map(len, dataset["text"])) > 0


@pytest.mark.parametrize(("split", "size"), [("train", 60000), ("test", 10000)])
def test_fashion_mnist_is_balanced(split, size):
    images, labels = real_data.fashion_mnist_arrays(split)
    assert images.shape == (size, 28, 28)
    assert np.bincount(labels).tolist() == [size // 10] * 10


def test_images_survive_their_encoding():
    images, labels = real_data.fashion_mnist_arrays("test")
    dataset = real_data.image_dataset(images[:50], labels[:50], real_data.FASHION_MNIST_LABELS)
    assert np.array_equal(np.stack([np.asarray(image) for image in dataset["image"]]), images[:50])
    assert dataset["label"] == labels[:50].tolist()


def test_mnist_has_ten_thousand_distinct_digits():
    dataset = real_data.mnist()
    assert len({image.tobytes() for image in dataset["image"]}) == len(dataset) == 10000


def test_brown_has_fifteen_genres():
    dataset = real_data.brown()
    assert (len(dataset), len(set(dataset["genre"])), len(set(dataset["document"]))) == (57340, 15, 500)
    assert dataset[0]["text"].startswith("The Fulton County Grand Jury said Friday an investigation of Atlanta's")


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "data.gz"
    path.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"data.gz has sha256 .* not the version that was tested"):
        real_data.check(path, "0" * 64)
