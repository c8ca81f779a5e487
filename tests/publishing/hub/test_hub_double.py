"""The double of the Hub behaves as the real client expects of the Hub."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_double import HubDouble, validate_card

WEIGHTS = bytes(range(256)) * 64
FILES = {
    "config.json": b'{"model_type": "bert"}\n',
    "model.safetensors": WEIGHTS,
    "llfc/recipe.yaml": b"models: []\n",
}


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def push(api: HfApi, repo_id: str, files: dict[str, bytes], **options):
    operations = [add(path, content) for path, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message="Upload", **options)


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_an_upload_comes_back_as_it_went(hub: HubDouble, tmp_path: Path) -> None:
    api = hub.api()
    assert api.whoami()["name"] == "me"
    assert api.create_repo("me/model") == f"{hub.endpoint}/me/model"
    commit = push(api, "me/model", FILES)
    assert hub.files("me/model") == FILES
    assert commit.oid == api.model_info("me/model").sha == hub.commits("me/model")[0].sha

    folder = Path(snapshot_download("me/model"))
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        *FILES,
        ".gitattributes",
    }
    assert all((folder / path).read_bytes() == content for path, content in FILES.items())
    assert folder.is_relative_to(hub.home)

    by_path = {entry.path: entry for entry in api.list_repo_tree("me/model", recursive=True)}
    assert by_path["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert by_path["config.json"].lfs is None
    assert by_path["config.json"].size == len(FILES["config.json"])
    assert [entry.path for entry in api.list_repo_tree("me/model", "llfc")] == ["llfc/recipe.yaml"]
    assert api.get_paths_info("me/model", ["config.json", "absent"])[0].path == "config.json"


def test_large_files_go_to_the_storage_host_and_never_with_a_token(hub: HubDouble) -> None:
    hub.api().create_repo("me/model")
    push(hub.api(), "me/model", FILES)
    hf_hub_download("me/model", "model.safetensors")
    on_storage = [request for request in hub.requests if request.on_storage_host]
    assert [request.method for request in on_storage] == ["PUT", "GET"]
    assert not any(request.has_token for request in on_storage)


def test_an_upload_that_changes_nothing_makes_no_commit(hub: HubDouble) -> None:
    hub.api().create_repo("me/model")
    first = push(hub.api(), "me/model", FILES)
    again = push(hub.api(), "me/model", FILES)
    assert again.oid == first.oid
    assert len(hub.commits("me/model")) == 2
    assert sum(request.method == "PUT" for request in hub.requests) == 1


def test_branches_tags_and_deletions(hub: HubDouble) -> None:
    api = hub.api()
    hub.add_repo("me/model", FILES)
    api.create_branch("me/model", branch="trial/one")
    api.create_commit(
        "me/model", [CommitOperationDelete("llfc/", is_folder=True)], commit_message="x", revision="trial/one"
    )
    api.create_tag("me/model", tag="v1")
    assert set(hub.files("me/model", "trial/one")) == {"config.json", "model.safetensors"}
    assert hub.files("me/model", "v1") == FILES
    refs = api.list_repo_refs("me/model")
    assert [ref.name for ref in refs.branches] == ["main", "trial/one"]
    assert [ref.name for ref in refs.tags] == ["v1"]
    assert [c.title for c in api.list_repo_commits("me/model", revision="trial/one")] == [
        "x",
        "Upload",
        "initial commit",
    ]
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch("me/model", branch="trial/one")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/model", "absent.json")


def test_a_pull_request_leaves_main_alone(hub: HubDouble) -> None:
    hub.add_repo("someone/model", FILES)
    commit = push(hub.api(), "someone/model", {"config.json": b"{}"}, create_pr=True)
    assert commit.pr_url == f"{hub.endpoint}/someone/model/discussions/1"
    assert hub.files("someone/model") == FILES
    assert hub.files("someone/model", "refs/pr/1")["config.json"] == b"{}"
    listed = list(hub.api().get_repo_discussions("someone/model", discussion_status="open"))
    assert [(d.num, d.author, d.git_reference) for d in listed] == [(1, "me", "refs/pr/1")]


def test_who_may_do_what(hub: HubDouble) -> None:
    reader = hub.api(hub.add_user("me", role="read"))
    stranger = hub.api(hub.add_user("stranger"))
    member = hub.api(hub.add_user("member", organizations=("someone",)))
    hub.add_repo("me/secret", FILES, private=True)
    hub.add_repo("someone/gated", FILES, gated=True, granted=("me",))

    assert reader.model_info("me/secret").private
    for outsider, status in ((stranger, 404), (hub.api(False), 401)):
        with pytest.raises(RepositoryNotFoundError) as hidden:
            outsider.model_info("me/secret")
        assert status_of(hidden) == status
    with pytest.raises(HfHubHTTPError) as no_role:
        push(reader, "me/secret", {"a.txt": b"a"})
    assert status_of(no_role) == 403
    with pytest.raises(HfHubHTTPError) as no_namespace:
        stranger.create_repo("someone/new")
    assert status_of(no_namespace) == 403
    assert "don't have the rights" in str(no_namespace.value)
    member.create_repo("someone/new", private=True)
    assert hub.repositories["model", "someone/new"].private
    with pytest.raises(HfHubHTTPError) as conflict:
        member.create_repo("someone/new")
    assert status_of(conflict) == 409
    member.create_repo("someone/new", exist_ok=True)

    assert hub.api().hf_hub_download("someone/gated", "config.json")
    assert stranger.model_info("someone/gated").gated == "manual"
    with pytest.raises(GatedRepoError):
        stranger.hf_hub_download("someone/gated", "model.safetensors")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.api("hf_wrong").whoami()
    hub.api().auth_check("me/secret", write=True)
    with pytest.raises(HfHubHTTPError):
        hub.api().auth_check("someone/gated", write=True)


def test_a_data_set_is_a_repository_too(hub: HubDouble) -> None:
    hub.api().create_repo("me/data", repo_type="dataset")
    push(hub.api(), "me/data", {"train.csv": b"text,label\na,0\n"}, repo_type="dataset")
    path = hf_hub_download("me/data", "train.csv", repo_type="dataset")
    assert Path(path).read_bytes() == b"text,label\na,0\n"


def test_a_long_listing_has_pages(hub: HubDouble) -> None:
    hub.page_size = 3
    hub.add_repo("me/model", {f"{i}.txt": b"x" for i in range(7)})
    assert len(list(hub.api().list_repo_tree("me/model", recursive=True))) == 8


def test_failures_on_demand(hub: HubDouble) -> None:
    api = hub.api()
    hub.add_repo("me/model", FILES)
    hub.fail("GET", r"^/api/models/me/model$", status=500, message="on fire")
    with pytest.raises(HfHubHTTPError, match="on fire"):
        api.model_info("me/model")
    api.model_info("me/model")
    hub.fail("GET", r"^/api/models/", status=404, error_code="RepoNotFound")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/model")
    hub.fail("GET", r"^/api/models/", status=429, headers={"ratelimit": '"api";r=0;t=7'})
    with pytest.raises(HfHubHTTPError, match="Retry after 7 seconds"):
        api.model_info("me/model")
    hub.fail("POST", r"/commit/", status=504, applies_after=True)
    with pytest.raises(HfHubHTTPError):
        push(api, "me/model", {"a.txt": b"a"})
    assert hub.files("me/model")["a.txt"] == b"a"
    with pytest.raises(HfHubHTTPError, match="commit has happened since"):
        push(api, "me/model", {"b.txt": b"b"}, parent_commit="0" * 40)


def test_a_dropped_connection_is_retried_by_the_client(hub: HubDouble) -> None:
    hub.api().create_repo("me/model")
    hub.fail("PUT", r"", drop=True)
    push(hub.api(), "me/model", FILES)
    assert hub.files("me/model") == FILES
    assert [request.status for request in hub.requests if request.method == "PUT"] == [0, 200]


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: free", "known licenses"),
        ("base_model: [https://example.org/a]", "not valid"),
        ("base_model_relation: child", "must be one of"),
        ("language: English", "ISO 639"),
        ("tags: [1]", "must be a string"),
        ("model-index: [{name: a, results: [{task: {}, dataset: {}, metrics: []}]}]", "required"),
        ("a: b: c", "not valid"),
    ],
)
def test_the_metadata_of_a_card_is_validated(hub: HubDouble, metadata: str, complaint: str) -> None:
    text = f"---\n{metadata}\n---\n# A card\n"
    assert any(complaint in error for error in validate_card(text)[0])
    hub.api().create_repo("me/model")
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(hub.api(), "me/model", {"README.md": text.encode()})
    assert hub.files("me/model") == {}


def test_a_card_can_be_validated_alone(hub: HubDouble) -> None:
    ModelCard("---\nlicense: mit\n---\n").validate()
    with pytest.raises(ValueError, match="known licenses"):
        ModelCard("---\nlicense: free\n---\n").validate()


def test_a_child_process_finds_the_double(hub: HubDouble) -> None:
    hub.add_repo("me/model", FILES)
    program = "import huggingface_hub as h; print(h.whoami()['name'], h.model_info('me/model').sha)"
    done = subprocess.run([sys.executable, "-c", program], env=hub.env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["me", hub.commits("me/model")[0].sha]


def test_transformers_loads_a_model_by_its_id(hub: HubDouble, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    model = BertForSequenceClassification(config)
    model.push_to_hub("me/tiny", private=True)
    assert set(hub.files("me/tiny")) >= {"config.json", "model.safetensors"}
    loaded = AutoModelForSequenceClassification.from_pretrained("me/tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
