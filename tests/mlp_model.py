"""A plain MLP as a user's own `PreTrainedModel`; importing this file registers it and its adapter."""

from itertools import pairwise

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_llfc.adapters import declare, register_adapter
from hf_llfc.adapters.blocks import linear
from hf_llfc.adapters.canonical_forms import scaled
from hf_llfc.symmetry import PermutationSpec
from hf_llfc.symmetry.canonical import CanonicalForm


class MLPConfig(PretrainedConfig):
    """The sizes of an MLP on flattened images.

    Args:
        image_size: height and width of an image.
        num_channels: colours of an image.
        hidden_sizes: neurons of each hidden layer.
    """

    model_type = "mlp_classifier"

    def __init__(self, image_size=28, num_channels=1, hidden_sizes=(512, 512, 512), **kwargs):
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)


class MLPLayer(nn.Module):
    """One hidden layer; its output is the layer's features."""

    def __init__(self, inputs: int, neurons: int):
        super().__init__()
        self.dense = nn.Linear(inputs, neurons)

    def forward(self, features_bi: torch.Tensor) -> torch.Tensor:
        return self.dense(features_bi).relu()


class MLPForImageClassification(PreTrainedModel):
    """Hidden layers with ReLU and a linear classifier."""

    config_class = MLPConfig
    base_model_prefix = "mlp"
    main_input_name = "pixel_values"

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2, *config.hidden_sizes]
        self.layers = nn.ModuleList(MLPLayer(inputs, neurons) for inputs, neurons in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        features_bi = pixel_values.flatten(1)
        for layer in self.layers:
            features_bi = layer(features_bi)
        logits = self.classifier(features_bi)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def mlp_adapter(config: MLPConfig) -> PermutationSpec:
    """The neurons of every hidden layer may be permuted."""
    names = ["pixels", *(f"neurons.{place}" for place in range(len(config.hidden_sizes)))]
    layers = [
        linear(f"layers.{place}.dense", out, into, bias=True) for place, (into, out) in enumerate(pairwise(names))
    ]
    return declare(
        config,
        *layers,
        linear("classifier", "labels", names[-1], bias=True),
        sizes={
            "pixels": config.num_channels * config.image_size**2,
            "labels": config.num_labels,
            **dict(zip(names[1:], config.hidden_sizes, strict=True)),
        },
        symmetric=("neurons",),
    )


def mlp_form(config: MLPConfig) -> CanonicalForm:
    """ReLU lets a positive scale of every neuron through."""
    layers = [f"layers.{place}.dense" for place in range(len(config.hidden_sizes))]
    circuits = [
        scaled(f"neurons.{place}", [f"{into}.weight", f"{into}.bias"], [f"{out}.weight"])
        for place, (into, out) in enumerate(pairwise([*layers, "classifier"]))
    ]
    return CanonicalForm(mlp_adapter(config), circuits=tuple(circuits))


register_adapter("mlp_classifier", mlp_adapter, form=mlp_form)
AutoConfig.register("mlp_classifier", MLPConfig, exist_ok=True)
AutoModelForImageClassification.register(MLPConfig, MLPForImageClassification, exist_ok=True)
