"""What the tests of pushes share."""

import logging
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_llfc import publish
from hf_llfc.errors import PublishingError
from tests.hub_double import HubDouble

REPO = "me/merged"
SECRET = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def no_token_is_ever_printed(
    hub: HubDouble, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """Neither in a log of any level nor on the terminal."""
    caplog.set_level(logging.DEBUG)
    yield
    out, err = capfd.readouterr()
    for token in [*hub.users, SECRET]:
        assert token not in caplog.text + out + err


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits seconds between its own retries."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def history(hub: HubDouble, repo_id: str = REPO, revision: str = "main") -> list[str]:
    """Commits above the first one, which every repository has."""
    return [commit.message for commit in hub.commits(repo_id, revision)][:-1]


def refused(folder: Path, repo_id: str = REPO, **options: Any) -> str:
    """What a user is told: no other error hangs on it, and no token is in it or in its traceback."""
    with pytest.raises(PublishingError) as error:
        publish(folder, repo_id, **options)
    assert error.value.__cause__ is None
    shown = "".join(traceback.format_exception(error.value)) + repr(error.value)
    assert not re.search(r"hf_[0-9a-f]{8}|secretsecret", shown)
    return str(error.value)
