"""Tiny data for tests: a tokenizer of whole words, sentences of uneven length, images; and a user's own model."""

from itertools import pairwise

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import ImageClassifierOutput

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
WORDS = [f"w{number}" for number in range(40)]


def word_tokenizer(**options) -> PreTrainedTokenizerFast:
    """A tokenizer of 45 words that puts [CLS] and [SEP] around a text."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    arguments = {"model_max_length": 30, **names, "mask_token": "[MASK]", **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **arguments)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 12 words."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(1, 13))) for _ in range(count)]


def text_rows(count: int = 23, classes: int = 5) -> datasets.Dataset:
    """Labelled sentences in the columns `text` and `label`."""
    labels = np.random.default_rng(1).integers(classes, size=count).tolist()
    return datasets.Dataset.from_dict({"text": sentences(count), "label": labels})


def pixel_rows(count: int = 23, *, channels: int = 3, size: int = 15, classes: int = 5) -> datasets.Dataset:
    """Labelled images as floating-point arrays in the columns `pixel_values` and `label`."""
    generator = np.random.default_rng(2)
    features = datasets.Features(
        {
            "pixel_values": datasets.Array3D((channels, size, size), "float32"),
            "label": datasets.Value("int64"),
        }
    )
    pixels = generator.standard_normal((count, channels, size, size)).astype(np.float32)
    labels = generator.integers(classes, size=count)
    return datasets.Dataset.from_dict({"pixel_values": pixels, "label": labels}, features=features)


class PerceptronConfig(PretrainedConfig):
    """Sizes of the perceptron."""

    model_type = "llfc-test-perceptron"

    def __init__(self, inputs: int = 12, width: int = 16, depth: int = 3, activation: str = "module", **kwargs):
        super().__init__(**kwargs)
        self.inputs, self.width, self.depth, self.activation = inputs, width, depth, activation


class Perceptron(PreTrainedModel):
    """A user's own model, which knows only `pixel_values`."""

    config_class = PerceptronConfig

    def __init__(self, config: PerceptronConfig):
        super().__init__(config)
        sizes = [config.inputs] + [config.width] * config.depth
        self.layers = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(sizes)])
        self.activation = nn.ReLU() if config.activation == "module" else None
        self.head = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = self.activation(hidden) if self.activation is not None else torch.relu(hidden)
        return ImageClassifierOutput(logits=self.head(hidden))


def perceptron(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> Perceptron:
    """A random perceptron of 5 classes."""
    torch.manual_seed(seed)
    return Perceptron(PerceptronConfig(num_labels=5, **sizes)).to(dtype).eval()


def vector_rows(count: int = 23, *, inputs: int = 12, classes: int = 5) -> datasets.Dataset:
    """What the perceptron takes: vectors and labels."""
    generator = np.random.default_rng(3)
    pixels = generator.standard_normal((count, inputs)).tolist()
    return datasets.Dataset.from_dict({"pixel_values": pixels, "label": generator.integers(classes, size=count)})
