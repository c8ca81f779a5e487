"""A push is checked before, whole or not at all, and compared afterwards: over real HTTP, whatever goes wrong."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, snapshot_download
from safetensors.numpy import save_file

from hf_llfc import publish
from hf_llfc.checkpoints.writing.output import list_files
from hf_llfc.publishing import write_card
from hf_llfc.publishing.record import Result, RunRecord
from tests.hub_double import HubDouble, validate_card
from tests.publishing.pushing import (
    REPO,
    SECRET,
    contents,
    history,
    no_token_is_ever_printed,
    no_waiting,
    refused,
)
from tests.publishing.samples import RECIPE, layer, make_folder, make_report

__all__ = ["no_token_is_ever_printed", "no_waiting"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "merged", report=make_report())


# -- what a push does


def test_the_folder_arrives_as_it_is_in_one_commit(hub: HubDouble, folder: Path) -> None:
    assert publish(folder, REPO) == f"{hub.endpoint}/me/merged"
    assert hub.files(REPO) == contents(folder)
    assert len(history(hub)) == 1
    assert history(hub)[0].startswith("Upload a merge made with hf_llfc")
    assert not hub.repositories["model", REPO].private
    downloaded = Path(snapshot_download(REPO))
    assert ModelCard.load(downloaded / "README.md").data.tags == ["merge", "hf-llfc"]


def test_the_endpoint_and_the_token_can_be_given(tmp_path: Path, hub: HubDouble, folder: Path) -> None:
    other = hub.add_user("ada")
    with HubDouble(tmp_path / "home") as second:
        token = second.add_user("ada")
        assert publish(folder, "ada/merged", endpoint=second.endpoint, token=token) == f"{second.endpoint}/ada/merged"
        assert second.files("ada/merged") == contents(folder)
    publish(folder, "ada/merged", token=other)
    assert {request.user for request in hub.requests if request.has_token} == {"ada"}


def test_a_bare_name_goes_to_ones_own_namespace(hub: HubDouble, folder: Path) -> None:
    assert publish(folder, "merged") == f"{hub.endpoint}/me/merged"


def test_an_organization_takes_it_too(hub: HubDouble, folder: Path) -> None:
    token = hub.add_user("me", organizations=("lab",))
    publish(folder, "lab/merged", token=token, private=True)
    assert hub.repositories["model", "lab/merged"].private


def test_a_second_push_of_the_same_sends_and_commits_nothing(hub: HubDouble, folder: Path) -> None:
    first = publish(folder, REPO)
    before = len(hub.requests)
    assert publish(folder, REPO) == first
    assert len(history(hub)) == 1
    assert {request.method for request in hub.requests[before:]} == {"GET", "POST"}
    assert not any("/commit/" in request.path for request in hub.requests[before:])


def test_only_what_changed_is_sent_again(hub: HubDouble, folder: Path) -> None:
    publish(folder, REPO)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    before = len(hub.requests)
    publish(folder, REPO)
    assert hub.files(REPO) == contents(folder)
    assert len(history(hub)) == 2
    assert not any(request.method == "PUT" for request in hub.requests[before:])


def test_shards_of_an_earlier_push_do_not_stay_beside_new_weights(hub: HubDouble, folder: Path) -> None:
    (folder / "llfc" / "path.png").write_bytes(b"\x89PNG\0")
    publish(folder, REPO)
    hub.commit(REPO, {"NOTES.md": "mine"})
    for name in [*folder.glob("model*"), folder / "llfc" / "path.png"]:
        name.unlink()
    save_file({"weight": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    publish(folder, REPO)
    assert hub.files(REPO) == {**contents(folder), "NOTES.md": b"mine"}


def test_only_the_output_is_uploaded(hub: HubDouble, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    strangers = [".env", ".git/config", "id_rsa", "notes/todo.txt", "run.py", "state.sqlite", "training_args.bin"]
    for name in strangers:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("HF_TOKEN=hf_secretsecretsecret")
    publish(folder, REPO)
    assert hub.files(REPO) == {name: data for name, data in contents(folder).items() if name not in strangers}
    assert f"not uploaded, because no run wrote them: {', '.join(strangers)}; name what" in caplog.text


@pytest.mark.parametrize("listed", [True, False])
def test_what_the_user_names_is_uploaded_too(hub: HubDouble, folder: Path, listed: bool) -> None:
    if listed:  # as a run does, at its end
        list_files(folder)
    for name in ("examples/one.json", "examples/two.json", "other.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    publish(folder, REPO, include=["examples/*"])
    assert hub.files(REPO) == {name: data for name, data in contents(folder).items() if name != "other.json"}
    assert "no file is called exampel/*" in refused(folder, include=["exampel/*"])


def test_the_card_is_one_for_its_target(hub: HubDouble, folder: Path) -> None:
    before = write_card(folder, name="merged").read_text()
    (folder / "README.md").write_text(before.replace("## Limits", "A line of mine.\n\n## Limits"))
    publish(folder, "lady/soup", token=hub.add_user("lady"))
    card = hub.files("lady/soup")["README.md"].decode()
    assert 'model="lady/soup"' in card and "\n# soup\n" in card and "A line of mine." in card
    assert 'model="merged"' not in card and "\n# merged\n" not in card
    publish(folder, REPO)
    again = hub.files(REPO)["README.md"].decode()
    assert 'model="me/merged"' in again and "A line of mine." in again


def test_a_run_s_own_list_says_what_is_pushed(hub: HubDouble, folder: Path) -> None:
    list_files(folder)
    (folder / "vocab.txt").write_text("x")  # a name that runs write, and this one did not
    publish(folder, REPO)
    assert "vocab.txt" not in hub.files(REPO)


def test_an_existing_repository_of_ones_own_is_used(hub: HubDouble, folder: Path) -> None:
    hub.add_repo(REPO, {"README.md": "---\nlicense: mit\n---\n", "NOTES.md": "mine"}, private=True)
    publish(folder, REPO)
    assert hub.files(REPO) == {**contents(folder), "NOTES.md": b"mine"}


def test_a_branch_is_made_where_it_is_missing(hub: HubDouble, folder: Path) -> None:
    hub.add_repo(REPO)
    assert publish(folder, REPO, revision="trial/one") == f"{hub.endpoint}/me/merged/tree/trial/one"
    assert hub.files(REPO, "trial/one") == contents(folder)
    assert hub.files(REPO) == {}
    publish(folder, REPO, revision="trial/one")
    assert len(history(hub, revision="trial/one")) == 1
    publish(folder, "me/fresh", revision="v2")
    assert hub.files("me/fresh", "v2") == contents(folder)


def test_a_pull_request_is_opened_once(hub: HubDouble, folder: Path) -> None:
    hub.add_repo("grace/merged", {"README.md": "---\nlicense: mit\n---\n"})
    url = publish(folder, "grace/merged", create_pr=True)
    assert url == f"{hub.endpoint}/grace/merged/discussions/1"
    assert hub.files("grace/merged", "refs/pr/1") == contents(folder)
    assert set(hub.files("grace/merged")) == {"README.md"}
    assert publish(folder, "grace/merged", create_pr=True) == url
    assert len(hub.repositories["model", "grace/merged"].pull_requests) == 1
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "changed": True}))
    assert publish(folder, "grace/merged", create_pr=True).endswith("/discussions/2")


def test_a_tag_names_the_commit_and_does_not_move(hub: HubDouble, folder: Path) -> None:
    assert publish(folder, REPO, tag="v1") == f"{hub.endpoint}/me/merged/tree/v1"
    assert hub.files(REPO, "v1") == contents(folder)
    before = len(hub.commits(REPO))
    publish(folder, REPO, tag="v1")  # it names these files already
    publish(folder, REPO, tag="v1.0")
    assert hub.files(REPO, "v1.0") == contents(folder)
    assert len(hub.commits(REPO)) == before
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    sha = hub.commits(REPO)[0].sha
    said = f"the tag 'v1' of me/merged names another commit ({sha[:7]}), and tags do not move: take another"
    assert refused(folder, tag="v1") == said
    assert hub.commits(REPO)[0].sha == sha
    publish(folder, REPO, tag="v2", revision="next")
    assert hub.files(REPO, "v2") == hub.files(REPO, "next") == contents(folder) != hub.files(REPO, "v1")


def test_a_tag_whose_making_failed_is_made_by_the_next_push(hub: HubDouble, folder: Path) -> None:
    hub.fail("POST", "/tag/", status=500, times=-1)
    assert "the files are pushed, but tagging them 'v1' failed" in refused(folder, tag="v1")
    assert hub.files(REPO) == contents(folder)
    hub.heal()
    publish(folder, REPO, tag="v1")
    assert hub.files(REPO, "v1") == contents(folder)
    assert len(history(hub)) == 1


@pytest.mark.parametrize("name", ["", "a b", "-x", "a..b", "x.lock", "/a", "a/", "a/.b", "refs/heads/x", "0" * 40, "@"])
@pytest.mark.parametrize("what", ["revision", "tag"])
def test_a_branch_or_tag_that_git_would_refuse_is_refused_here(
    hub: HubDouble, folder: Path, what: str, name: str
) -> None:
    assert f"{name!r} is no name of a {'branch' if what == 'revision' else 'tag'}" in refused(folder, **{what: name})
    assert not hub.requests


def test_the_command_line_of_a_child_process_pushes_as_well(hub: HubDouble, folder: Path) -> None:
    program = f"from hf_llfc import publish; print(publish({str(folder)!r}, 'me/merged', private=True))"
    done = subprocess.run([sys.executable, "-c", program], env=hub.env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{hub.endpoint}/me/merged"
    assert hub.files(REPO) == contents(folder)
    assert hub.token not in done.stdout + done.stderr


# -- what is refused before the Hub is asked


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def unlist(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["absent.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "README.md").unlink(), "README.md is missing"),
        (lambda f: (f / "llfc" / "recipe.yaml").unlink(), "llfc/recipe.yaml is missing"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors is missing"),
        (
            lambda f: truncate(f / "model-00001-of-00002.safetensors"),
            "the file is cut off: tensor layer.1.weight needs",
        ),
        (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 20), "not a safetensors file"),
        (lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b""), "not a safetensors file"),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"[]"),
            "its header does not start with",
        ),
        (unlist, "lacks absent.weight"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is not an index of shards"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "there are no weights"),
        (lambda f: (f / "generation_config.json").symlink_to("/etc/hostname"), "generation_config.json is a link"),
        (lambda f: (f / "llfc" / "recipe.yaml").write_text("models: 3"), "recipe.yaml: the recipe cannot be run"),
    ],
)
def test_a_folder_that_is_not_whole_stays_here(
    hub: HubDouble, folder: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(folder)
    assert message in refused(folder)
    assert not hub.repositories


def test_all_that_is_wrong_with_a_folder_is_said_at_once(hub: HubDouble, folder: Path) -> None:
    for name in ("config.json", "README.md", "model-00001-of-00002.safetensors"):
        (folder / name).unlink()
    message = refused(folder)
    assert all(name in message for name in ("3 problems", "config.json", "README.md", "model-00001"))
    assert not hub.requests


def bad_path(loss: float | None, accuracy: float | None = 0.5) -> list[dict[str, Any]]:
    ends = [{"alpha": alpha, "loss": 0.4, "metrics": {"accuracy": 0.9}} for alpha in (0.0, 1.0)]
    return [ends[0], {"alpha": 0.5, "loss": loss, "metrics": {"accuracy": accuracy}}, ends[1]]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (make_report(path=bad_path(None)), "not every number is finite: loss at α = 0.5"),
        (make_report(path=bad_path(0.4, None)), "not every number is finite: accuracy at α = 0.5"),
        (make_report(layers=[{**layer("x", 0.5, 0, 0, 1), "llfc": {"mean": None, "std": None}}]), "features of x"),
        (make_report(path=bad_path(0.7)), "the loss of the merge is 0.7000, that of its worst parent 0.4"),
        (make_report(verdict={"answer": "do not merge", "because": "of the barrier"}), "not to merge: of the barrier"),
        (make_report(verdict={"answer": "contradict", "because": "of classes"}), "not to merge: of classes"),
        ({"schema": "other"}, "not a report of this version"),
        ([], "holds no report"),
    ],
)
def test_a_merge_that_its_diagnosis_calls_broken_is_pushed_only_by_force(
    hub: HubDouble, folder: Path, report: Any, message: str
) -> None:
    (folder / "llfc" / "llfc_report.json").write_text(json.dumps(report))
    assert message in refused(folder)
    assert not hub.requests
    publish(folder, REPO, force=True)
    assert hub.files(REPO) == contents(folder)


@pytest.mark.parametrize(("loss", "message"), [(0.7, "the loss of the merge is 0.7"), (math.nan, "not finite")])
@pytest.mark.parametrize("diagnosed", [True, False])
def test_a_merge_off_the_path_is_judged_by_its_own_evaluation(
    hub: HubDouble, folder: Path, loss: float, message: str, diagnosed: bool
) -> None:
    if diagnosed:
        (folder / "llfc" / "llfc_report.json").write_text(json.dumps(make_report(models=[{}, {}])))
    parents = (Result("a", 0.4), Result("b", 0.4))
    RunRecord(results=(*parents, Result("merged", loss, is_merge=True))).save(folder)
    assert message in refused(folder)
    RunRecord(results=(*parents, Result("merged", 0.5, is_merge=True))).save(folder)
    publish(folder, REPO)


@pytest.mark.parametrize("report", [make_report(path=bad_path(0.55)), make_report(path=bad_path(0.45)), None])
def test_a_merge_that_is_a_little_worse_or_not_diagnosed_may_go(hub: HubDouble, folder: Path, report: Any) -> None:
    path = folder / "llfc" / "llfc_report.json"
    path.unlink() if report is None else path.write_text(json.dumps(report))
    publish(folder, REPO)
    assert hub.files(REPO) == contents(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_seen_without_a_diagnosis(hub: HubDouble, folder: Path, value: float) -> None:
    (folder / "llfc" / "llfc_report.json").unlink()
    for name in folder.glob("model*"):
        name.unlink()
    weights = {"a": np.ones((4, 4), np.float16), "b": np.array([1, value], np.float16), "c": np.arange(3)}
    save_file(weights, folder / "model.safetensors")
    assert "should not be published: not every weight is finite: b. Force it" in refused(folder)
    assert not hub.requests
    publish(folder, REPO, force=True)


def test_what_the_hub_would_not_take_is_refused_before_it_is_asked(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_llfc.publishing.hub.folder.LARGEST_FILE", 100)
    monkeypatch.setattr("hf_llfc.publishing.hub.folder.MOST_ENTRIES", 3)
    message = refused(folder)
    assert "model-00001-of-00002.safetensors has" in message and "smaller max_shard_size" in message
    assert "the folder . has" in message and "more than the 3 that the Hub takes" in message
    assert not hub.requests


@pytest.mark.parametrize(("private", "said"), [(True, True), (None, False)])
def test_private_storage_that_ends_is_warned_of(
    hub: HubDouble,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    private: bool | None,
    said: bool,
) -> None:
    monkeypatch.setattr("hf_llfc.publishing.hub.preflight.FREE_PRIVATE_STORAGE", 100)
    publish(folder, REPO, private=private)
    assert ("the Hub may refuse them" in caplog.text) is said


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "me/-x", "me/a b", ""])
def test_a_name_that_is_none_is_refused(hub: HubDouble, folder: Path, name: str) -> None:
    assert "is no name of a repository" in refused(folder, name)
    assert not hub.requests


def test_a_pull_request_has_no_branch(hub: HubDouble, folder: Path) -> None:
    assert "either create_pr or a revision" in refused(folder, create_pr=True, revision="x")
    assert "either create_pr or a tag" in refused(folder, create_pr=True, tag="x")


def test_offline_is_said_and_not_waited_for(hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refused(folder)
    # It is said first: there is no use in logging in.
    monkeypatch.delenv("HF_TOKEN")
    assert "unset HF_HUB_OFFLINE" in refused(folder)
    assert not hub.requests


# -- what is refused before anything is changed on the Hub


def test_without_a_token_one_is_told_to_log_in(hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(folder)


def test_a_wrong_token_is_refused_and_not_shown(hub: HubDouble, folder: Path) -> None:
    assert "does not accept your token" in refused(folder, token=SECRET)


def test_a_token_that_may_only_read_is_refused(hub: HubDouble, folder: Path) -> None:
    assert "your token may only read" in refused(folder, token=hub.add_user("me", role="read"))
    assert not hub.repositories


def test_a_fine_grained_token_writes_only_where_it_may(hub: HubDouble, folder: Path) -> None:
    elsewhere = hub.add_user("me", role="fineGrained", organizations=("lab",), writable=("lab",))
    assert "your token has no right to write to the repositories of 'me'" in refused(folder, token=elsewhere)
    assert not hub.repositories
    publish(folder, "lab/merged", token=elsewhere)
    assert hub.files("lab/merged") == contents(folder)


def test_a_namespace_of_others_is_refused(hub: HubDouble, folder: Path) -> None:
    token = hub.add_user("me", organizations=("lab",))
    message = refused(folder, "grace/merged", token=token)
    assert "you may not write to 'grace'; you may write to: me, lab" in message
    hub.add_repo("grace/merged")
    assert "open a pull request instead" in refused(folder, "grace/merged", token=token)
    hub.add_repo("grace/secret", private=True)
    assert "does not exist, so no pull request" in refused(folder, "grace/secret", create_pr=True)


@pytest.mark.parametrize(("is_private", "wanted"), [(True, False), (False, True)])
def test_a_repository_of_the_other_visibility_is_not_touched(
    hub: HubDouble, folder: Path, is_private: bool, wanted: bool
) -> None:
    hub.add_repo(REPO, private=is_private)
    found, asked = ("private", "public") if is_private else ("public", "private")
    assert f"exists and is {found}, not {asked}" in refused(folder, private=wanted)
    assert history(hub) == []


def test_a_card_that_the_hub_does_not_accept_makes_no_repository(hub: HubDouble, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: free-for-all\n---\n")
    assert validate_card((folder / "README.md").read_text())[0]
    message = refused(folder)
    assert "the Hub does not accept the metadata" in message
    assert "free-for-all" in message
    assert not hub.repositories


def test_other_weights_are_overwritten_only_by_force(hub: HubDouble, folder: Path) -> None:
    hub.add_repo(REPO, {"pytorch_model.bin": b"\0 theirs", "config.json": "{}"})
    assert "already holds other weights (pytorch_model.bin)" in refused(folder)
    assert history(hub) == ["Upload"]
    publish(folder, REPO, force=True)
    assert hub.files(REPO) == contents(folder)


def test_weights_that_are_these_are_not_others(hub: HubDouble, folder: Path) -> None:
    hub.add_repo(REPO, {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")})
    publish(folder, REPO)
    assert hub.files(REPO) == contents(folder)


def test_private_parents_do_not_become_public_by_merging(hub: HubDouble, folder: Path) -> None:
    hub.add_repo("ada/bert-tweets", private=True)
    hub.add_repo("grace/bert-films", gated=True)
    token = hub.add_user("me", organizations=("ada",))
    assert "the parent ada/bert-tweets is private, the merge would be public" in refused(folder, token=token)
    assert ("model", REPO) not in hub.repositories
    publish(folder, REPO, token=token, private=True)
    assert hub.repositories["model", REPO].private
    publish(folder, "me/public", token=token, force=True)


def test_the_terms_of_a_gated_parent_are_remembered(
    hub: HubDouble, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_repo("grace/bert-films", gated=True)
    publish(folder, REPO)
    assert "the parent grace/bert-films is gated" in caplog.text


@pytest.mark.parametrize("license", ["cc-by-nd-4.0", "cc-by-nc-nd-3.0"])
def test_a_licence_that_forbids_derivatives_keeps_the_merge_private(hub: HubDouble, folder: Path, license: str) -> None:
    hub.add_repo("grace/bert-films", {"README.md": f"---\nlicense: {license}\n---\n"})
    assert f"the licence of grace/bert-films ({license}) does not allow sharing derivatives" in refused(folder)
    assert ("model", REPO) not in hub.repositories
    publish(folder, REPO, private=True)
    assert hub.repositories["model", REPO].private
    publish(folder, "me/public", force=True)


def test_licences_that_differ_are_warned_of(hub: HubDouble, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.add_repo("ada/bert-tweets", {"README.md": "---\nlicense: mit\n---\n"})
    hub.add_repo("grace/bert-films", {"README.md": "---\nlicense: gpl-3.0\n---\n"})
    publish(folder, REPO)
    assert "different licences (ada/bert-tweets: mit, grace/bert-films: gpl-3.0)" in caplog.text


# -- what goes wrong on the way


@pytest.mark.parametrize(
    "token", ["hf_" + "a1B2" * 8, "hf_oauth_eyJhbGciOi.eyJzdWIiOiI-x.c2ln_bmF0dXJl", "api_org_abcdefghij"]
)
def test_a_token_that_the_hub_repeats_is_left_out(hub: HubDouble, folder: Path, token: str) -> None:
    hub.fail("POST", "/commit/", status=403, message=f"the token {token} may not; see hf_llfc.publishing", times=-1)
    message = refused(folder)
    assert "you have no right to (the token … may not; see hf_llfc.publishing)" in message
    hub.fail("GET", "/whoami", status=500, message=f"Authorization: Bearer {token}", times=-1)
    assert token not in refused(folder)


def test_what_was_uploaded_before_the_cut_is_not_sent_again(hub: HubDouble, folder: Path) -> None:
    hub.fail("PUT", "", status=403, skip=1, times=-1)
    refused(folder)
    assert len(hub.blobs) == 1
    hub.heal()
    sent = len([request for request in hub.requests if request.method == "PUT" and request.status == 200])
    publish(folder, REPO)
    again = [request for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert len(again) - sent == 1


def test_a_cut_that_the_client_mends_is_not_noticed(hub: HubDouble, folder: Path) -> None:
    hub.fail("PUT", "", drop=True, times=2)
    publish(folder, REPO)
    assert hub.files(REPO) == contents(folder)


@pytest.mark.parametrize("options", [{"status": 504}, {"drop": True}])
def test_a_commit_whose_answer_is_lost_is_found(hub: HubDouble, folder: Path, options: dict[str, Any]) -> None:
    hub.fail("POST", "/commit/", applies_after=True, **options)
    assert publish(folder, REPO) == f"{hub.endpoint}/me/merged"
    assert len(history(hub)) == 1
    hub.add_repo("grace/merged")
    hub.fail("POST", "/commit/", applies_after=True, **options)
    assert publish(folder, "grace/merged", create_pr=True) == f"{hub.endpoint}/grace/merged/discussions/1"


def test_somebody_elses_commit_in_between_is_not_run_over(hub: HubDouble, folder: Path) -> None:
    hub.add_repo(REPO, {"NOTES.md": "mine"})
    original = hub.upload_mode

    def commit_meanwhile(*arguments: Any) -> str:
        hub.upload_mode = original  # type: ignore[method-assign]
        hub.commit(REPO, {"NOTES.md": "changed"})
        return original(*arguments)

    hub.upload_mode = commit_meanwhile  # type: ignore[method-assign]
    assert "somebody committed meanwhile; push again" in refused(folder)
    assert hub.files(REPO) == {"NOTES.md": b"changed"}
    publish(folder, REPO)


def test_what_was_committed_is_read_back_and_compared(
    hub: HubDouble, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HubDouble._commit

    def corrupt(self: HubDouble, repository: Any, ref: str, files: Any, *rest: Any) -> str:
        if "config.json" in files:
            stored = files["config.json"]
            files = {**files, "config.json": type(stored)(stored.content.replace(b"8", b"9"))}
        return commit(self, repository, ref, files, *rest)

    monkeypatch.setattr(HubDouble, "_commit", corrupt)
    message = refused(folder)
    assert "does not hold what was uploaded: config.json differ" in message


def test_a_recipe_as_the_pipeline_writes_it_is_understood(hub: HubDouble, folder: Path) -> None:
    assert RECIPE["models"]
    before = len(hub.requests)
    publish(folder, REPO)
    asked = [request.path for request in hub.requests[before:] if request.path.startswith("/api/models/")]
    assert "/api/models/ada/bert-tweets" in asked
    assert "/api/models/grace/bert-films" in asked
