"""Tiny pairs of models with data, for every measure that compares two models."""

from contextlib import nullcontext

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_llfc.adapters.derived.verify import randomise
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data
from tests.evaluation.tiny_data import perceptron, pixel_rows, text_rows, vector_rows, word_tokenizer
from tests.tiny_models import FullDouble, tiny_model

HEADS = {
    "bert": ("text-classification", "sequence-classification"),
    "distilbert": ("fill-mask", "masked-lm"),
    "gpt2": ("text-classification", "sequence-classification"),
    "llama-tied": ("text-generation", "causal-lm"),
    "mixtral": ("text-generation", "causal-lm"),
    "vit": ("image-classification", "image-classification"),
    "resnet-basic": ("image-classification", "image-classification"),
    "albert": ("text-classification", None),
    "bart": ("text-classification", None),
    "phi3": ("text-generation", None),
    "t5": ("text-classification", None),
    "grouped": ("image-classification", None),
    "perceptron": ("image-classification", None),
}


class GroupedConfig(PretrainedConfig):
    """Of the model below."""

    model_type = "llfc-test-grouped"


class Grouped(PreTrainedModel):
    """Convolutions with groups, strides and wrapped borders, in place activations, and one over a row of places."""

    config_class = GroupedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Conv2d(3, 6, 3, bias=True)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 8, 3, stride=2, groups=2, padding=1, padding_mode="circular")
        self.third = nn.Conv1d(8, 4, 5, padding=2, dilation=2)
        self.head = nn.Linear(4, config.num_labels)
        self.post_init()

    def forward(self, pixel_values):
        hidden = self.relu(self.first(pixel_values))
        hidden = self.relu(self.second(hidden))
        hidden = torch.tanh(self.third(hidden.flatten(2)))
        return ImageClassifierOutput(logits=self.head(hidden.mean(dim=-1)))


SIZES = {"vocab_size": 50, "num_labels": 5, "pad_token_id": 0}


def other_model(family):
    """A model that `tiny_models` does not have."""
    if family == "albert":
        config = transformers.AlbertConfig(
            embedding_size=8, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, **SIZES
        )
        return transformers.AlbertForSequenceClassification(config)
    if family == "bart":
        config = transformers.BartConfig(
            d_model=12,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=20,
            max_position_embeddings=40,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            **SIZES,
        )
        return transformers.BartForSequenceClassification(config)
    if family == "phi3":
        config = transformers.Phi3Config(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            **SIZES,
        )
        return transformers.Phi3ForCausalLM(config)
    if family == "t5":
        config = transformers.T5Config(
            d_model=8,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            d_kv=4,
            feed_forward_proj="gated-gelu",
            eos_token_id=2,
            decoder_start_token_id=0,
            **SIZES,
        )
        return transformers.T5ForSequenceClassification(config)
    assert family == "grouped"
    return Grouped(GroupedConfig(num_labels=5))


def pair(family, dtype=torch.float64, **options):
    """Two random models of one architecture."""
    if family == "perceptron":
        return [perceptron(seed, dtype, **options) for seed in (0, 1)]
    _, head = HEADS[family]
    if head is not None:
        return [tiny_model(family, head, seed, dtype) for seed in (0, 1)]
    models = []
    for seed in (0, 1):
        model = other_model(family)
        randomise(model, torch.Generator().manual_seed(seed))
        models.append(model.to(dtype).eval())
    return models


def data_of(family, config, count=11, **settings):
    """Samples for a family, uneven in length where they are text."""
    task, _ = HEADS[family]
    tokenizer = None
    if family == "perceptron":
        rows = vector_rows(count)
    elif task == "image-classification":
        rows = pixel_rows(count, classes=config.num_labels)
    else:
        rows, tokenizer = text_rows(count, classes=config.num_labels), word_tokenizer()
    if task == "text-generation":
        settings = {"blocks": False, **settings}
    return load_evaluation_data(EvaluationConfig(task=task, dataset=rows, **settings), tokenizer, config)


def samples_of(data, dtype):
    """Every sample alone, hence without padding."""
    found = []
    for position in range(len(data)):
        batch = data.encode(np.array([position]))
        batch.pop("labels", None)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
        found.append(batch)
    return found


def precise(dtype):
    """Float64 throughout for models in it, nothing for others."""
    return FullDouble() if dtype == torch.float64 else nullcontext()


def tensors_of(model, samples, sites):
    """What modules take or give for every sample alone, every call apart.

    Args:
        model: Any.
        samples: As `samples_of` gives them.
        sites: Names of modules, with ``:input`` for what they take.

    Returns:
        By site a list over samples of lists over calls of float64 arrays.
    """
    kept = {site: [] for site in sites}
    handles = []
    for site in sites:
        module = model.get_submodule(site.removesuffix(":input"))

        def before(module, args, site=site):
            kept[site][-1].append(args[0].detach().double().numpy().copy())

        def after(module, args, output, site=site):
            output = output if isinstance(output, torch.Tensor) else output[0]
            kept[site][-1].append(output.detach().double().numpy().copy())

        taken = site.endswith(":input")
        handles.append(module.register_forward_pre_hook(before) if taken else module.register_forward_hook(after))
    with torch.no_grad(), precise(model.dtype):
        for sample in samples:
            for site in sites:
                kept[site].append([])
            model(**sample)
    for handle in handles:
        handle.remove()
    return kept


def subject_of(models, weights):
    """The merge of models with these weights."""
    combined = CombinedModel(models)
    combined.move_to(weights)
    return Subject(tuple(models), combined.model, tuple(weights), tuple(weights))
