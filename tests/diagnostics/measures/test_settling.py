"""Settling depths against a lens written by hand, in float64."""

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput

from hf_llfc.adapters.derived.verify import randomise
from hf_llfc.diagnostics.measures import settling
from hf_llfc.diagnostics.measures.passes import Passes
from hf_llfc.diagnostics.measures.settling import Lens, Settling, followed
from hf_llfc.diagnostics.streaming import over_batches
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode
from tests.diagnostics.pairs import SIZES, data_of, pair, precise, samples_of, subject_of, tensors_of
from tests.tiny_models import tiny_model

BLOCKS = {
    "gpt2-lm": "transformer.h",
    "gpt2": "transformer.h",
    "llama-tied": "model.layers",
    "phi3": "model.layers",
    "mixtral": "model.layers",
    "vit": "vit.layers",
}


def models_of(family):
    if family != "gpt2-lm":
        return pair(family)
    return [tiny_model("gpt2", "causal-lm", seed, torch.float64) for seed in (0, 1)]


def data_for(family, config, **settings):
    return data_of("llama-tied" if family == "gpt2-lm" else family, config, **settings)


def rows_of(subject, data):
    with precise(torch.float64), evaluation_mode(*subject.models, subject.merge):
        measure = Settling(subject, next(data.batches())[0])
        passes = Passes(subject, {"settling": measure})
        return measure.rows(over_batches(data, passes.add, measure.sums, "measuring"))


def lens(family, model, features):
    """Final norm and head, by name."""
    if family == "vit":
        return model.classifier(model.vit.layernorm(features)[:, 0])
    if family == "gpt2":
        return model.score(model.transformer.ln_f(features))[:, -1]
    if family == "gpt2-lm":
        return model.lm_head(model.transformer.ln_f(features))
    return model.lm_head(model.model.norm(features))


def settled(family, model, samples):
    """Share of predictions that are settled after every block, by answer and by divergence."""
    names = [f"{BLOCKS[family]}.{number}" for number in range(2)]
    kept = tensors_of(model, samples, names)
    answers, closes = [], []
    for place in range(len(samples)):
        with torch.no_grad(), precise(torch.float64):
            logits = [lens(family, model, torch.from_numpy(kept[name][place][0])) for name in names]
        first, last = (each.reshape(-1, each.shape[-1]).log_softmax(-1) for each in logits)
        answers.append(first.argmax(-1) == last.argmax(-1))
        closes.append((last.exp() * (last - first)).sum(-1) < 0.1)
    return float(torch.cat(answers).double().mean()), float(torch.cat(closes).double().mean())


@pytest.mark.parametrize("family", BLOCKS)
def test_every_share_is_that_of_a_lens_by_hand(family):
    models = models_of(family)
    with torch.no_grad():  # so that some predictions are close
        for model in models:
            model.get_output_embeddings().weight.mul_(0.3) if family != "vit" and family != "gpt2" else None
    data = data_for(family, models[0].config, count=9, batch_size=4)
    subject = subject_of(models, (0.375, 0.625))
    rows = rows_of(subject, data)
    samples = samples_of(data, torch.float64)
    found = {(row.layer, row.of): (row.answer, row.close) for row in rows}
    for name, model in zip(("model 1", "model 2", "merge"), (*models, subject.merge), strict=True):
        expected = settled(family, model, samples)
        assert found[f"{BLOCKS[family]}.0", name] == pytest.approx(expected, abs=1e-12)
        assert found[f"{BLOCKS[family]}.1", name] == (1, 1)


def test_a_prediction_settles_where_it_stays():
    final = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    after = {  # predictions by block; the second one leaves its answer again, the third never has it
        0: [[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]],
        1: [[3.0, 0.0], [0.0, 3.0], [0.0, 3.0]],
        2: [[2.9, 0.0], [0.3, 0.0], [0.0, 3.0]],
    }
    asked = []

    def through(block, chosen):
        asked.append((block, chosen.tolist()))
        return torch.tensor(after[block])[chosen]

    depths = settling.settling_depths(final, through, 4)
    assert depths.tolist() == [[0, 2, 3], [0, 3, 3]]
    assert asked == [(2, [0, 1, 2]), (1, [0, 1]), (0, [0])]


def test_few_tokens_of_long_samples_are_followed(monkeypatch):
    monkeypatch.setattr(settling, "MOST_TOKENS", 4)
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 6 + [0], [1] * 3 + [0] * 7])
    chosen = followed(mask)
    assert chosen.sum(dim=1).tolist() == [4, 4, 3]
    assert not (chosen & (mask == 0)).any()
    gaps = np.diff(chosen[0].nonzero()[:, 0].numpy())
    assert set(gaps) <= {2, 3}


@pytest.mark.parametrize("at_once", [1, 7, 2**24])
def test_neither_batches_nor_parts_change_a_number(monkeypatch, at_once):
    monkeypatch.setattr(settling, "ELEMENTS_AT_ONCE", 50 * at_once)
    models = pair("llama-tied")
    subject = subject_of(models, (0.5, 0.5))
    found = [rows_of(subject, data_of("llama-tied", models[0].config, batch_size=size)) for size in (1, 3, 32)]
    assert found[0] == found[1] == found[2]


def test_models_stay_as_they_are():
    models = pair("llama-tied")
    subject = subject_of(models, (0.5, 0.5))
    before = copy.deepcopy(subject.merge.state_dict())
    rows_of(subject, data_of("llama-tied", models[0].config))
    for model in (*models, subject.merge):
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
    assert all(torch.equal(value, before[name]) for name, value in subject.merge.state_dict().items())


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bert", "BertForSequenceClassification has no norm between its last block and its head"),
        ("distilbert", "DistilBertForMaskedLM has no norm between its last block and its head"),
        ("bart", "BartForSequenceClassification has no norm between its last block and its head"),
        ("albert", "AlbertForSequenceClassification runs a block more than once"),
        ("perceptron", "Perceptron has no stack of blocks"),
        ("resnet-basic", "ResNetForImageClassification has no stack of blocks"),
    ],
)
def test_where_the_head_cannot_read_blocks_one_sentence_says_so(family, why):
    models = pair(family)
    expected = f"settling: {why}, so that its head cannot read earlier blocks; leave settling out of the measures"
    with pytest.raises(EvaluationError, match=expected):
        rows_of(subject_of(models, (0.5, 0.5)), data_of(family, models[0].config))


def test_what_is_not_finite_is_named():
    model, other = pair("vit")
    with torch.no_grad():
        other.classifier.bias[0] = float("nan")
    with pytest.raises(EvaluationError, match="'logits' of model 2 are not finite"):
        rows_of(subject_of([model, other], (1.0, 0.0)), data_of("vit", model.config))


@pytest.mark.parametrize("kind", ["t5", "modernbert"])
def test_encoders_and_decoders_that_end_in_a_norm_have_a_lens(kind):
    if kind == "t5":
        model, _ = pair("t5")
        batch, _ = next(data_of("t5", model.config).batches())
    else:
        config = transformers.ModernBertConfig(
            hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **SIZES
        )
        model = transformers.ModernBertForSequenceClassification(config).double().eval()
        batch, _ = next(data_of("bert", model.config).batches())
    with precise(torch.float64), evaluation_mode(model):
        found = Lens(model, batch)
    assert len(found.layers) == 2 and not found.by_token


def test_logits_that_depend_on_earlier_blocks_are_refused():
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=12, n_layer=2, n_head=2, pad_token_id=0)

    class TwoHeads(transformers.GPT2LMHeadModel):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            out = self.transformer(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            return CausalLMOutput(logits=self.lm_head(out.last_hidden_state + out.hidden_states[1]))

    model = TwoHeads(config).eval()
    randomise(model, torch.Generator().manual_seed(0))
    batch, _ = next(data_of("llama-tied", config).batches())
    with evaluation_mode(model), pytest.raises(EvaluationError, match="depend on more than its last block"):
        Lens(model, batch)
