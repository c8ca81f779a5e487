"""Every tensor of the models is merged, copied or dropped, and plan, record, card and answer say which."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_llfc.cli import main
from hf_llfc.pipeline.planning import plan
from hf_llfc.publishing.record import RunRecord, TensorsOf
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import quiet
from tests.parents.test_what_fits import BERT, LLAMA, NSP, SMALL, VISION, Change, having, lacking, model

__all__ = ["quiet"]

POSITIONS = having(**{"bert.embeddings.position_ids": torch.arange(20)[None]})
FREQUENCIES = having(**{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
PROBE = having(probe=torch.ones(3))

CASES: dict[str, tuple[str, dict[str, Any], tuple[Change, ...], tuple[Change, ...], str]] = {
    "all": ("LlamaForCausalLM", LLAMA, (), (), "21 of 21 tensors merged, 0 copied, 0 dropped"),
    "a pooler in the first": (
        "BertModel", BERT, (), (lacking("pooler"),),
        "37 of 39 tensors merged, 2 copied from a (pooler.dense.bias, pooler.dense.weight), 0 dropped",
    ),
    "a pooler in the second": (
        "RobertaModel", BERT, (lacking("pooler"),), (),
        "37 of 39 tensors merged, 2 copied from b (pooler.dense.bias, pooler.dense.weight), 0 dropped",
    ),
    "a pooler of images": (
        "ViTModel", {**SMALL, **VISION}, (), (lacking("pooler"),),
        "38 of 40 tensors merged, 2 copied from a (pooler.dense.bias, pooler.dense.weight), 0 dropped",
    ),
    "leftovers of the first": (
        "BertForMaskedLM", BERT, (NSP,), (),
        "42 of 42 tensors merged, 0 copied, 2 of a dropped (cls.seq_relationship.bias, cls.seq_relationship.weight)",
    ),
    "leftovers of the second": (
        "BertForMaskedLM", BERT, (), (NSP,),
        "42 of 42 tensors merged, 0 copied, 2 of b dropped (cls.seq_relationship.bias, cls.seq_relationship.weight)",
    ),
    "tensors of nobody in both": (
        "LlamaForCausalLM", LLAMA, (PROBE,), (PROBE,),
        "21 of 21 tensors merged, 0 copied, 1 of a dropped (probe), 1 of b dropped (probe)",
    ),
    "a buffer": (
        "BertForSequenceClassification", BERT, (POSITIONS,), (),
        "41 of 41 tensors merged, 0 copied, 0 dropped; 1 buffer left out, which the config gives",
    ),
    "buffers of both": (
        "LlamaForCausalLM", LLAMA, (FREQUENCIES,), (FREQUENCIES,),
        "21 of 21 tensors merged, 0 copied, 0 dropped; 4 buffers left out, which the config gives",
    ),
}  # fmt: skip


def shelf_of(architecture: str, config: dict[str, Any], *changes: tuple[Change, ...]) -> None:
    """Saves models a, b, … in the current folder, each with changes of its own."""
    for seed, own in enumerate(changes):
        folder = Path("abc"[seed])
        model(architecture, seed, **config).save_pretrained(folder)
        for change in own:
            change(folder)


def planned(models: list[str], **keys: Any) -> dict[str, Any]:
    entries = [{"model": each} for each in models]
    answer = plan(load_recipe({"models": entries, "output_dir": "out", **keys}))
    steps = {step["step"]: step["what"] for step in answer["steps"]}
    assert answer["tensors"]["sentence"] == steps["tensors"]
    return answer["tensors"]


@pytest.mark.parametrize("case", CASES)
def test_plan_record_card_and_answer_say_it(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    architecture, config, a, b, sentence = CASES[case]
    shelf_of(architecture, config, a, b)
    assert planned(["a", "b"])["sentence"] == sentence
    assert main(["merge", "a", "b", "--out", "out", "--quiet", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["sentence"] == sentence
    record = RunRecord.load(tmp_path / "out")
    assert record.tensors is not None and record.tensors.sentence == sentence
    card = (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    assert f"**Tensors.** {sentence}." in card


def test_the_command_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shelf_of("LlamaForCausalLM", LLAMA, (), ())
    assert main(["merge", "a", "b", "--out", "out", "--quiet"]) == 0
    assert "21 of 21 tensors merged, 0 copied, 0 dropped\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "merged", "copied"),
    [
        ({"models": [{"model": "a"}]}, 0, {"a": 21}),
        (
            {"models": [{"model": name, "parameters": {"weight": [{"filter": "mlp", "value": weight}, {"value": 0.5}]}}
             for name, weight in (("a", 0.0), ("b", 1.0))]}, 15, {"b": 6},
        ),
        ({"modules": {"text": {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}}}, 0, {"a": 21}),
    ],
    ids=["one model", "weights of one model alone", "a slice of one model"],
)  # fmt: skip
def test_what_is_one_models_own_counts_as_copied(keys, merged, copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shelf_of("LlamaForCausalLM", LLAMA, (), ())
    if "modules" in keys:
        keys = {"slices": keys["modules"]["text"]["slices"], "merge_method": "passthrough"}
    found = plan(load_recipe({"output_dir": "out", **keys}))["tensors"]
    assert (found["merged"], {each["model"]: each["count"] for each in found["copied"]}) == (merged, copied)


def test_of_many_tensors_their_modules_are_named():
    names = [f"model.vision_tower.layers.{i}.weight" for i in range(7)] + ["model.projector.weight"]
    found = TensorsOf.of("a", names)
    assert found.listed == "model.vision_tower.layers (7), model.projector.weight"


@pytest.mark.parametrize("names", [[f"tensor{i}" for i in range(9)], [f"a{i}.weight" for i in range(9)]])
def test_more_modules_than_can_be_named_are_counted(names):
    found = TensorsOf.of("a", names)
    assert found.count == 9 and len(found.names) == 5 and found.listed.endswith(", …")
