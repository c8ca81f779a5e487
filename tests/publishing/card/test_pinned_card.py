"""A card names the commits that parents and data were read at, whatever the recipe called them."""

import json
from pathlib import Path

import datasets.config
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_llfc.pipeline.flow import run
from tests.hub_double import HubDouble, validate_card
from tests.publishing.hub.test_life import push_parent


def test_everything_on_the_hub_is_named_by_its_commit(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for seed, name in enumerate(("tweets", "films")):
        push_parent(f"me/{name}", seed, tmp_path / name)
    rows = [{"text": f"{('good', 'bad')[number % 2]} film", "label": number % 2} for number in range(12)]
    files = {"test.jsonl": "\n".join(map(json.dumps, rows)), "README.md": "---\nlicense: mit\n---\n"}
    data = hub.add_repo("me/reviews", files, repo_type="dataset")
    commits = {name: hub.commits(f"me/{name}")[0].sha for name in ("tweets", "films")}
    recipe = {
        "models": [{"model": "me/tweets"}, {"model": "me/films@main"}],
        "diagnose": {"task": "text-classification", "dataset": "me/reviews", "alphas": 3},
        "output_dir": str(tmp_path / "out"),
    }
    folder = run(recipe).folder

    text = (folder / "README.md").read_text()
    assert validate_card(text) == ([], [])
    card = ModelCard(text)
    card.validate()
    metadata = card.data.to_dict()
    assert metadata["base_model"] == ["me/tweets", "me/films"]
    assert metadata["base_model_revisions"] == [f"me/{name}@{sha}" for name, sha in commits.items()]
    measured = card.data.eval_results[0]
    found = (measured.dataset_type, measured.dataset_split, measured.dataset_revision, measured.dataset_args)
    assert found == ("me/reviews", "test", data, {"samples": 12})
    for name, sha in commits.items():
        assert f"- **me/{name}:** commit `{sha}`" in text
    assert f"- **Data:** me/reviews@{data}, split test, 12 samples" in text

    assert f"[me/reviews@{data[:7]}](https://huggingface.co/datasets/me/reviews/tree/{data})" in text

    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    kept = yaml.safe_load((folder / "llfc" / "recipe.yaml").read_text())
    for as_run in (shown, kept):
        assert as_run["diagnose"]["dataset"] == f"me/reviews@{data}"
        assert as_run["diagnose"]["split"] == "test"
        assert [entry["model"] for entry in as_run["models"]] == metadata["base_model_revisions"]

    # What the recipe as run names stays the same when its names move on.
    hub.commit("me/reviews", {"test.jsonl": files["test.jsonl"].replace("good", "very")}, repo_type="dataset")
    again = run({**kept, "output_dir": str(tmp_path / "again")})
    assert again.table[-1]["loss"] == pytest.approx(measured.metric_value, rel=1e-5)
