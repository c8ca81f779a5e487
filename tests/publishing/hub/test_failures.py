"""Every failure of a push ends in one clear message with nothing half-pushed, and a rerun completes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hf_llfc import publish
from tests.hub_double import HubDouble
from tests.publishing.pushing import REPO, contents, history, no_token_is_ever_printed, no_waiting, refused
from tests.publishing.samples import make_folder, make_report

__all__ = ["no_token_is_ever_printed", "no_waiting"]

TARGET = {"revision": "trial", "tag": "v1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "merged", report=make_report())


@dataclass(frozen=True)
class Failure:
    """One way in which a push fails.

    Attributes:
        breaks: What makes it fail.
        message: What must be said.
        repairs: What makes it pass, where healing the double does not.
        options: Of the push.
    """

    breaks: Callable[[HubDouble, Path], Any]
    message: str
    repairs: Callable[[HubDouble, Path], Any] = field(default=lambda hub, folder: None)
    options: dict[str, Any] = field(default_factory=dict)


STAGES = {
    "log in": ("GET", "^/api/whoami-v2", "logging in"),
    "look up": ("GET", "^/api/models/me/merged$", "looking up me/merged"),
    "validate": ("POST", "^/api/validate-yaml", "validating the card"),
    "parent": ("GET", "^/api/models/ada/bert-tweets", "looking up the parent ada/bert-tweets"),
    "create": ("POST", "^/api/repos/create", "creating me/merged"),
    "branch": ("POST", "/branch/", "creating the branch trial"),
    "preupload": ("POST", "/preupload/", "uploading to me/merged"),
    "batch": ("POST", "/objects/batch", "uploading to me/merged"),
    "send": ("PUT", "", "uploading to me/merged"),
    "verify": ("POST", "/objects/verify", "uploading to me/merged"),
    "commit": ("POST", "/commit/", "uploading to me/merged"),
    "read back": ("GET", "/tree/", "listing the files of me/merged"),
    "tag": ("POST", "/tag/", "the files are pushed, but tagging them 'v1'"),
}
ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "401": ({"status": 401, "message": "Invalid credentials in Authorization header"}, "does not accept your token"),
    "403": ({"status": 403}, "you have no right to"),
    "409": ({"status": 409}, "somebody else changed the repository at the same time"),
    "413": ({"status": 413}, "the Hub takes no upload of this size"),
    "429 with a time": ({"status": 429, "headers": {"Retry-After": "7"}}, "too many requests; push again in 7 seconds"),
    "429 with a limit": ({"status": 429, "headers": {"ratelimit": '"api";r=0;t=55'}}, "push again in 55 seconds"),
    "429": ({"status": 429}, "too many requests; push again later"),
    "500": ({"status": 500}, "the Hub has a problem (500)"),
    "503": ({"status": 503}, "the Hub has a problem (503)"),
    "gated": ({"status": 403, "error_code": "GatedRepo"}, "the repository is gated"),
    "cut": ({"drop": True}, "the connection broke"),
}
PASSED_OVER = {
    # A repository or branch that exists by now is what is wanted; a parent that is not there for this user is a folder.
    **{(stage, "409"): "exists" for stage in ("create", "branch")},
    **{("parent", answer): "a folder" for answer in ("401", "403", "409", "413", "gated")},
    ("look up", "gated"): "does not exist",
}


def failing(method: str, path: str, how: dict[str, Any]) -> Callable[[HubDouble, Path], None]:
    return lambda hub, folder: hub.fail(method, path, times=-1, **how)


FAILURES = {
    f"{stage}: {answer}": Failure(failing(method, path, how), f"{doing} … {said}")
    for stage, (method, path, doing) in STAGES.items()
    for answer, (how, said) in ANSWERS.items()
    if (stage, answer) not in PASSED_OVER
}


def expire_at_commit(hub: HubDouble, folder: Path) -> None:
    """The token runs out while the upload runs."""
    original = hub.upload_mode

    def upload_mode(*arguments: Any) -> str:
        hub.expired.add(hub.token)
        return original(*arguments)

    hub.upload_mode = upload_mode  # type: ignore[method-assign]


def give_back(hub: HubDouble, folder: Path) -> None:
    del hub.upload_mode


def card_with(license: str) -> Callable[[HubDouble, Path], Any]:
    return lambda hub, folder: (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")


FAILURES |= {
    "token expired": Failure(
        lambda hub, folder: hub.expired.add(hub.token),
        "logging in failed: the Hub does not accept your token; run `hf auth login`",
    ),
    "token expires meanwhile": Failure(expire_at_commit, "does not accept your token … is expired", give_back),
    "no room left": Failure(
        lambda hub, folder: setattr(hub, "storage_limit", 100),
        "the Hub takes no upload of this size (Private repository storage limit reached … make room",
    ),
    "file too large": Failure(
        lambda hub, folder: setattr(hub, "file_limit", 100), "takes no upload of this size … max_shard_size"
    ),
    "card refused": Failure(
        card_with("free-for-all"), "does not accept the metadata of … free-for-all", card_with("mit")
    ),
    "private parent": Failure(
        lambda hub, folder: (
            hub.add_repo("me/tweets", private=True)
            and (folder / "llfc" / "recipe.yaml").write_text("{models: [{model: me/tweets}], output_dir: merged}")
        ),
        "the parent me/tweets is private, the merge would be public",
        lambda hub, folder: setattr(hub.repositories["model", "me/tweets"], "private", False),
    ),
    "repository of others": Failure(
        lambda hub, folder: setattr(hub, "users", {hub.token: type(hub.users[hub.token])("you", "write", ())}),
        "you may not write to 'me'; you may write to: you",
        lambda hub, folder: setattr(hub, "users", {hub.token: type(hub.users[hub.token])("me", "write", ())}),
    ),
    "hidden repository": Failure(
        lambda hub, folder: hub.add_repo(REPO, private=True),
        "exists and is private, not public",
        lambda hub, folder: setattr(hub.repositories["model", REPO], "private", False),
        {"private": False},
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_message_leaves_nothing_half_and_a_rerun_completes(
    hub: HubDouble, folder: Path, name: str
) -> None:
    failure = FAILURES[name]
    failure.breaks(hub, folder)
    message = refused(folder, **TARGET, **failure.options)
    assert_says(message, failure.message)
    wanted = contents(folder)
    for repository in hub.repositories.values():
        if repository.repo_id == REPO:
            assert all(hub.files(REPO, ref) in ({}, wanted) for ref in repository.refs)
            assert "refs/tags/v1" not in repository.refs

    hub.heal()
    failure.repairs(hub, folder)
    assert publish(folder, REPO, **TARGET, **failure.options) == f"{hub.endpoint}/{REPO}/tree/v1"
    assert hub.files(REPO, "trial") == hub.files(REPO, "v1") == contents(folder)
    assert hub.files(REPO) == {}
    assert len(history(hub, revision="trial")) == 1


def assert_says(message: str, wanted: str) -> None:
    """One line, in which all parts of what is wanted stand, in their order."""
    assert "\n" not in message
    assert re.search(".*".join(re.escape(part) for part in wanted.split(" … ")), message), message


def test_a_failure_at_any_request_leaves_nothing_half(hub: HubDouble, folder: Path) -> None:
    """Not the failures that somebody thought of: every single request of a push is cut, one after the other."""
    publish(folder, "me/whole", **TARGET)
    count = len(hub.requests)
    assert count > 10
    for place in range(count):
        repo_id = f"me/merged-{place}"
        cut = Cut(hub, place)
        with cut:
            try:
                publish(folder, repo_id, **TARGET)
            except Exception as error:
                assert type(error).__name__ == "UnansweredError"
        repository = hub.repositories.get(("model", repo_id))
        if repository is not None:
            assert all(hub.files(repo_id, ref) in ({}, contents(folder)) for ref in repository.refs)
        publish(folder, repo_id, **TARGET)
        assert hub.files(repo_id, "v1") == contents(folder)
        assert len(history(hub, repo_id, "trial")) == 1


class Cut:
    """All requests after the first few are cut."""

    def __init__(self, hub: HubDouble, served: int) -> None:
        self.hub, self.served = hub, served

    def __enter__(self) -> None:
        original, left = self.hub.take_fault, iter(range(self.served))

        def take_fault(method: str, path: str) -> Any:
            if next(left, None) is not None:
                return original(method, path)
            self.hub.fail(method, "", drop=True)
            return original(method, path)

        self.hub.take_fault = take_fault  # type: ignore[method-assign]

    def __exit__(self, *exc_info: object) -> None:
        del self.hub.take_fault
        self.hub.heal()


def test_failures_on_the_way_are_told_by_the_command_line_in_one_line(
    hub: HubDouble, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from hf_llfc.cli import main

    hub.fail("POST", "/commit/", status=413, times=-1)
    assert main(["push", str(folder), REPO]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("hf-llfc: error:")]
    assert "the Hub takes no upload of this size" in line
    hub.heal()
    assert main(["push", str(folder), REPO, "--tag", "v1"]) == 0
    assert capfd.readouterr().out == f"{hub.endpoint}/{REPO}/tree/v1\n"
