"""The one place where tests get tiny models: seeded, built from configs, one row a family and head.

Every size in a config differs from the others wherever the architecture lets it, so that a mixed-up axis changes a
shape, and every parameter and running statistic is random, norms and biases too, so that a forgotten one changes the
output.
"""

from collections.abc import Callable

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from hf_llfc.adapters.derived.precision import FullDouble
from hf_llfc.adapters.derived.verify import randomise

AUTO_CLASSES = {
    "base": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
}

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert() -> PretrainedConfig:
    """3 heads of 8."""
    return transformers.BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=37,
        type_vocab_size=2,
        num_labels=5,
    )


def roberta() -> PretrainedConfig:
    """5 heads of 6."""
    return transformers.RobertaConfig(
        vocab_size=67,
        hidden_size=30,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=44,
        max_position_embeddings=35,
        type_vocab_size=1,
        num_labels=4,
    )


def distilbert() -> PretrainedConfig:
    """4 heads of 7."""
    return transformers.DistilBertConfig(
        vocab_size=59,
        dim=28,
        n_layers=2,
        n_heads=4,
        hidden_dim=36,
        max_position_embeddings=33,
        num_labels=5,
    )


def gpt2() -> PretrainedConfig:
    """3 heads of 8, MLP of its own width."""
    return transformers.GPT2Config(
        vocab_size=61,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=44,
        n_positions=37,
        num_labels=5,
        **TOKENS,
    )


def llama() -> PretrainedConfig:
    """2 key/value heads with 3 query heads each, head_dim 8 instead of 24 / 6, output head of its own."""
    return transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        max_position_embeddings=37,
        num_labels=5,
        tie_word_embeddings=False,
        **TOKENS,
    )


def llama_tied() -> PretrainedConfig:
    """The Llama above with biases and with the embedding as its output head."""
    config = llama()
    config.tie_word_embeddings = True
    config.attention_bias = True
    config.mlp_bias = True
    return config


def mistral() -> PretrainedConfig:
    """2 key/value heads with 4 query heads each, a window shorter than the inputs."""
    return transformers.MistralConfig(
        vocab_size=61,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=36,
        max_position_embeddings=37,
        sliding_window=5,
        num_labels=3,
        **TOKENS,
    )


def qwen2() -> PretrainedConfig:
    """2 key/value heads with 3 query heads each, biases on queries, keys and values."""
    return transformers.Qwen2Config(
        vocab_size=53,
        hidden_size=60,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=44,
        max_position_embeddings=37,
        num_labels=5,
        tie_word_embeddings=False,
        **TOKENS,
    )


def qwen3() -> PretrainedConfig:
    """3 key/value heads with 2 query heads each, norms on queries and keys, tied output head."""
    return transformers.Qwen3Config(
        vocab_size=67,
        hidden_size=28,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        intermediate_size=44,
        max_position_embeddings=37,
        num_labels=5,
        tie_word_embeddings=True,
        **TOKENS,
    )


def mixtral() -> PretrainedConfig:
    """3 key/value heads with 2 query heads each, 5 experts of which 2 answer.

    The grouped kernel that a reloaded model uses wants rows of a multiple of 16 bytes, hence 20 and 28.
    """
    return transformers.MixtralConfig(
        vocab_size=53,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        intermediate_size=28,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=37,
        num_labels=7,
        tie_word_embeddings=False,
        **TOKENS,
    )


def vit() -> PretrainedConfig:
    """4 heads of 7, 9 patches."""
    return transformers.ViTConfig(
        hidden_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=44,
        image_size=15,
        patch_size=5,
        num_channels=3,
        num_labels=6,
    )


def resnet_basic() -> PretrainedConfig:
    """Blocks of two convolutions; a stage with an identity shortcut, and projected ones."""
    return transformers.ResNetConfig(
        num_channels=3,
        embedding_size=6,
        hidden_sizes=[8, 12, 20],
        depths=[1, 2, 1],
        layer_type="basic",
        num_labels=5,
    )


def resnet_bottleneck() -> PretrainedConfig:
    """Blocks of three convolutions with a narrow middle."""
    return transformers.ResNetConfig(
        num_channels=3,
        embedding_size=6,
        hidden_sizes=[16, 28, 40],
        depths=[2, 1, 1],
        layer_type="bottleneck",
        num_labels=5,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied": llama_tied,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "vit": vit,
    "resnet-basic": resnet_basic,
    "resnet-bottleneck": resnet_bottleneck,
}

ENCODER_HEADS = ("base", "sequence-classification", "token-classification", "masked-lm")
DECODER_HEADS = ("base", "sequence-classification", "token-classification", "causal-lm")
IMAGE_HEADS = ("base", "image-classification")

HEADS: dict[str, tuple[str, ...]] = {
    "bert": ENCODER_HEADS,
    "roberta": ENCODER_HEADS,
    "distilbert": ENCODER_HEADS,
    "gpt2": DECODER_HEADS,
    "llama": DECODER_HEADS,
    "llama-tied": ("causal-lm",),
    "mistral": DECODER_HEADS,
    "qwen2": DECODER_HEADS,
    "qwen3": DECODER_HEADS,
    "mixtral": DECODER_HEADS,
    "vit": IMAGE_HEADS,
    "resnet-basic": IMAGE_HEADS,
    "resnet-bottleneck": IMAGE_HEADS,
}

TINY: list[tuple[str, str]] = [(family, head) for family, heads in HEADS.items() for head in heads]


def tiny_config(family: str) -> PretrainedConfig:
    """A fresh config of a family of `CONFIGS`."""
    return CONFIGS[family]()


def tiny_model(family: str, head: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model in eval mode whose every parameter and running statistic is drawn from `seed`.

    Args:
        family: a key of `CONFIGS`.
        head: a key of `AUTO_CLASSES`; the pairs that exist are the rows of `TINY`.
        seed: the draw; models of one seed and different dtypes differ by rounding alone.
        dtype: of all floating-point tensors. Run float64 models through `logits` or under `FullDouble`.
    """
    config = tiny_config(family)
    if config.model_type == "mixtral":
        config._experts_implementation = "eager"  # the grouped kernel has no float64
    model = AUTO_CLASSES[head].from_config(config)
    randomise(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


def tiny_inputs(model: PreTrainedModel, seed: int = 0, batch_size: int = 3) -> dict[str, torch.Tensor]:
    """Valid inputs of a tiny model: images, or token ids of which the last row is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if config.model_type in ("vit", "resnet"):
        size = config.image_size if config.model_type == "vit" else 32
        shape = (batch_size, config.num_channels, size, size)
        images = torch.randn(shape, generator=generator, dtype=torch.float64)
        return {"pixel_values": images.to(model.dtype)}
    length, padding = 11, 4
    ids = torch.randint(3, config.vocab_size, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, -padding:] = config.pad_token_id
    mask[-1, -padding:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.model_type == "bert":
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    return inputs


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's first output (logits, or the last hidden state of a base model), in the model's own precision."""
    with FullDouble():
        return model(**inputs)[0]
