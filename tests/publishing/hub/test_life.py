"""The whole life of a merge on a Hub: parents are pushed, merged by id and revision, published, and loaded again."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, PublishingError
from hf_llfc.pipeline.flow import run
from tests.hub_double import HubDouble, validate_card

CONFIG = BertConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
    num_labels=2,
)
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "book", "very", "not"]


def push_parent(repo_id: str, seed: int, folder: Path, *, private: bool = False) -> None:
    """Trains nothing: a seeded model with a tokenizer and a card, pushed by the real client."""
    torch.manual_seed(seed)
    BertForSequenceClassification(CONFIG).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A parent\n")
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id, private=private)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


@pytest.fixture
def recipe(hub: HubDouble, tmp_path: Path) -> dict:
    """A recipe whose parents lie on the Hub, one of them at a revision that is no longer the newest."""
    for seed, name in enumerate(("tweets", "films")):
        push_parent(f"me/{name}", seed, tmp_path / name)
    revision = hub.commits("me/films")[0].sha
    hub.commit("me/films", {"config.json": "{}", "model.safetensors": None}, message="broken later")
    data = tmp_path / "data.csv"
    rows = [f"{'very ' * (i % 3)}{('good', 'bad')[i % 2]} {('film', 'book')[i % 4 // 2]},{i % 2}" for i in range(24)]
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    return {
        "models": [
            {"model": "me/tweets", "parameters": {"weight": 0.5}},
            {"model": f"me/films@{revision}", "parameters": {"weight": 0.5}},
        ],
        "align": {"method": "weight_matching"},
        "diagnose": {"task": "text-classification", "dataset": str(data), "alphas": 3},
        "publish": {"repo_id": "me/merged"},
        "output_dir": str(tmp_path / "out"),
    }


def check_published(hub: HubDouble, recipe: dict, loaded: BertForSequenceClassification) -> None:
    """What a stranger finds on the Hub is the merge, with its evidence, and knows where it came from."""
    out = Path(recipe["output_dir"])
    local = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert hub.files("me/merged") == local
    assert len(hub.commits("me/merged")) == 2
    merged = load_file(out / "model.safetensors")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in loaded.state_dict().items())

    revisions = [hub.commits("me/tweets")[0].sha, hub.commits("me/films")[1].sha]
    as_run = yaml.safe_load(local["llfc/recipe.yaml"])
    assert [entry["model"] for entry in as_run["models"]] == [
        f"me/{name}@{revision}" for name, revision in zip(("tweets", "films"), revisions, strict=True)
    ]
    report = json.loads(local["llfc/llfc_report.json"])
    assert [model["revision"] for model in report["models"]] == revisions
    assert local["llfc/path.png"][:4] == local["llfc/layers.png"][:4] == b"\x89PNG"

    text = local["README.md"].decode()
    assert validate_card(text) == ([], [])
    card = ModelCard(text)
    assert card.data.base_model == ["me/tweets", "me/films"]
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert card.data.pipeline_tag == "text-classification"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    middle = next(point for point in report["path"] if point["alpha"] == 0.5)
    assert measured["loss"] == pytest.approx(middle["loss"], rel=1e-4)
    assert all(revision[:7] in card.text for revision in revisions)
    assert "units" in card.text and "Weight matching" in card.text
    assert str(out.parent) not in text


def check_as_a_stranger() -> None:
    """Loads what is on the Hub by its id, and lets the Hub's own client validate its card."""
    card = ModelCard.load("me/merged")
    card.validate()
    assert card.data.base_model == ["me/tweets", "me/films"]
    assert AutoTokenizer.from_pretrained("me/merged")("very good film")["input_ids"] == [6, 2, 4]


def test_a_merge_lives_on_the_hub(hub: HubDouble, recipe: dict) -> None:
    recipe["publish"] |= {"tag": "v1"}
    result = run(recipe)
    assert result.url == f"{hub.endpoint}/me/merged/tree/v1"
    assert hub.files("me/merged", "v1") == hub.files("me/merged")
    check_published(hub, recipe, AutoModelForSequenceClassification.from_pretrained("me/merged"))
    check_as_a_stranger()


def test_a_place_that_is_not_to_be_written_to_is_found_before_work(hub: HubDouble, recipe: dict) -> None:
    hub.add_repo("me/tagged", {"README.md": "# Tagged"})
    hub.api().create_tag("me/tagged", tag="v1")
    for target, said in (
        ({"repo_id": "someone/merged"}, "may not write"),
        ({"repo_id": "me//merged"}, "no name of a repository"),
        ({"repo_id": "me/tweets", "private": True}, "public, not private"),
        ({"repo_id": "me/merged", "tag": "a b"}, "no name of a tag"),
        ({"repo_id": "me/merged", "create_pr": True}, "no pull request can be opened"),
        ({"repo_id": "me/tagged", "tag": "v1"}, "the tag 'v1' of me/tagged names another commit"),
    ):
        with pytest.raises(PublishingError, match=said):
            run({**recipe, "publish": target})
        assert not Path(recipe["output_dir"]).exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda hub: setattr(hub.repositories["model", "me/films"], "private", True), "me/films is private"),
        (
            lambda hub: hub.commit("me/films", {"README.md": "---\nlicense: cc-by-nd-4.0\n---\n"}),
            "does not allow sharing",
        ),
        (lambda hub: hub.expired.add(hub.token), "the Hub does not accept your token"),
    ],
)
def test_parents_that_must_not_be_published_are_found_before_work(
    hub: HubDouble, recipe: dict, spoil: Callable[[HubDouble], object], said: str
) -> None:
    spoil(hub)
    before = len(hub.requests)
    with pytest.raises(PublishingError, match=said):
        run(recipe)
    assert not Path(recipe["output_dir"]).exists()
    assert not any("/resolve/" in request.path for request in hub.requests[before:])


def test_a_parent_that_is_gated_ends_the_run_before_work(hub: HubDouble, recipe: dict) -> None:
    hub.add_repo("grace/gated", hub.files("me/tweets"), gated=True)
    recipe["models"][0]["model"] = "grace/gated"
    with pytest.raises(CheckpointError, match=r"grace/gated: access to this model must be granted first"):
        run(recipe)
    assert not Path(recipe["output_dir"]).exists()


def test_files_that_the_hub_would_not_take_are_not_made(
    hub: HubDouble, recipe: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_llfc.publishing.hub.folder.LARGEST_FILE", 2000)
    with pytest.raises(PublishingError, match=r"the merge could not be published: .*smaller max_shard_size"):
        run(recipe)
    assert not Path(recipe["output_dir"]).exists()
    with pytest.raises(PublishingError, match="could not be published"):
        run({**recipe, "max_shard_size": 2500})


def test_a_merge_outlives_a_push_that_fails(hub: HubDouble, recipe: dict) -> None:
    recipe["publish"] |= {"tag": "v1", "revision": "trial"}
    hub.fail("POST", r"/commit/", status=403, times=-1)
    with pytest.raises(
        PublishingError, match=r"The merge is complete in .*out: `(hf-llfc push .*)` tries again"
    ) as error:
        run(recipe)
    assert (Path(recipe["output_dir"]) / "model.safetensors").is_file()
    hub.heal()
    _, *words = shlex.split(str(error.value).split("`")[1])
    assert main(words) == 0
    assert hub.files("me/merged", "v1") == hub.files("me/merged", "trial") != hub.files("me/merged")


ALONE = [sys.executable, "-m", "hf_llfc"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hf_llfc"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "hf_llfc"]


@pytest.mark.parametrize(
    "command",
    [ALONE, TORCHRUN, pytest.param([sys.executable, "-m", *ACCELERATE], marks=pytest.mark.slow)],
    ids=["alone", "torchrun", "accelerate"],
)
def test_a_recipe_whose_parents_and_data_lie_on_the_hub_runs(
    hub: HubDouble, recipe: dict, tmp_path: Path, command: list[str]
) -> None:
    data = {"README.md": "---\nlicense: mit\n---\n", "test.csv": Path(recipe["diagnose"]["dataset"]).read_bytes()}
    hub.add_repo("me/reviews", data, repo_type="dataset")
    recipe["diagnose"] |= {"dataset": "me/reviews", "split": "test"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = {**hub.env, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    check_published(hub, recipe, AutoModelForSequenceClassification.from_pretrained("me/merged"))
    check_as_a_stranger()
    card = ModelCard(hub.files("me/merged")["README.md"].decode())
    assert {(each.dataset_type, each.dataset_split) for each in card.data.eval_results} == {("me/reviews", "test")}
    assert "https://huggingface.co/datasets/me/reviews" in card.text


WATCHED = """
import json, sys
opened = []
def watch(event, arguments):
    # Who asks whether there is IPv6 makes a socket and binds it to the loopback device, and speaks to nobody.
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname", "socket.bind"):
        opened.append([event, repr(arguments[1:])])
    if event == "socket.bind" and arguments[1] != ("::1", 0):
        opened.append([event, repr(arguments[1:])])
sys.addaudithook(watch)
from hf_llfc.cli import main
code = main(sys.argv[1:])
sys.stderr.write("\\n" + json.dumps([code, opened]))
"""


def watched(*words: str, **environment: str) -> tuple[int, list[list[str]], str]:
    """Exit code of a command, every connection and every name that it looks up, and what it says."""
    command = [sys.executable, "-c", WATCHED, *words]
    inherited = {name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"}
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    code, opened = json.loads(done.stderr.splitlines()[-1])
    return code, opened, done.stderr


def test_offline_nothing_opens_a_connection(hub: HubDouble, recipe: dict, tmp_path: Path) -> None:
    publish = recipe.pop("publish")
    recipe["models"] = [{"model": str(tmp_path / name)} for name in ("tweets", "films")]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code, opened, said = watched("run", str(path), HF_HUB_OFFLINE="1")
    assert (code, opened) == (0, []), said
    out = Path(recipe["output_dir"])
    assert ModelCard((out / "README.md").read_text()).data.pipeline_tag == "text-classification"
    assert AutoModelForSequenceClassification.from_pretrained(out).num_labels == 2
    # What does need the network says so, before any work, and opens none either.
    path.write_text(yaml.safe_dump({**recipe, "publish": publish, "output_dir": str(tmp_path / "other")}))
    code, opened, said = watched("run", str(path), HF_HUB_OFFLINE="1")
    assert (code, opened) == (2, []) and "unset HF_HUB_OFFLINE to push" in said
    assert not (tmp_path / "other").exists()
    # The watch sees what is opened where it is allowed.
    code, opened, said = watched("push", str(out), "me/merged", HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.endpoint)
    assert code == 0 and opened, said
