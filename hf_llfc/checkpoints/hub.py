"""Checkpoints on the Hub: the revision is resolved to a commit once, and only what is needed is fetched."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    constants,
    get_cached_repo_tree,
    hf_hub_url,
    resolve_revision,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from hf_llfc.checkpoints.files import ADAPTER_CONFIG, CONFIG_FILE, first_line, local_sizes
from hf_llfc.checkpoints.header import LENGTH_BYTES, Header, header_length, parse_header, read_header
from hf_llfc.errors import CheckpointError

logger = logging.getLogger(__name__)

_FIRST_REQUEST_BYTES = 100_000  # enough for the headers of nearly all files in one request


@dataclass(frozen=True)
class HubFiles:
    """A checkpoint at one commit of a repository on the Hub, or in the Hub's cache."""

    id: str
    where: str
    folder: Path
    revision: str
    token: str | bool | None

    def sizes(self) -> Mapping[str, int]:
        """Path below the folder → size in bytes; offline perhaps only of what is in the cache."""
        try:
            tree = get_cached_repo_tree(self.id, revision=self.revision)
        except CachedRepoTreeNotFoundError:
            return local_sizes(self.folder)
        return {file.path: file.size for file in tree}

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads the files that are not in the cache.

        Raises:
            CheckpointError: If the Hub or the network refuses.
        """
        missing = [name for name in names if not (self.folder / name).is_file()]
        if not missing:
            return
        with _explained(self.id, self.where):
            snapshot_download(
                self.id,
                revision=self.revision,
                allow_patterns=[_literally(name) for name in missing],
                token=self.token,
            )
        for name in missing:
            if not (self.folder / name).is_file():
                raise CheckpointError(
                    f"{self.where}: {name} is not in the Hub's cache, and the Hub cannot be reached; go online once,"
                    " or unset HF_HUB_OFFLINE"
                )

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file; the rest of the file is not downloaded."""
        where = f"{self.where}/{name}"
        if (self.folder / name).is_file():
            return read_header(self.folder / name, where)
        with _explained(self.id, self.where):
            size = self.sizes()[name]
            first = self._first_bytes(name, min(size, _FIRST_REQUEST_BYTES))
            length = header_length(first[:LENGTH_BYTES], size, where)
            end = LENGTH_BYTES + length
            content = first if len(first) >= end else self._first_bytes(name, end)
        return parse_header(content[LENGTH_BYTES:end], size, where)

    def _first_bytes(self, name: str, count: int) -> bytes:
        url = hf_hub_url(self.id, name, revision=self.revision)
        headers = build_hf_headers(token=self.token) | {"Range": f"bytes=0-{count - 1}"}
        content = b""
        with http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            # A server that knows no ranges sends the whole file: stop reading when there is enough.
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= count:
                    break
        return content[:count]


def open_hub(model: str, token: str | bool | None = None) -> HubFiles:
    """Finds a repository on the Hub and fetches the config of its model or adapter.

    Args:
        model: `id` or `id@revision`.
        token: As for huggingface_hub; None takes the token of the login.

    Raises:
        CheckpointError: If there is no such repository or revision, no access to it, or no connection.
    """
    repo_id, _, revision = model.partition("@")
    with _explained(repo_id, model):
        commit = resolve_revision(repo_id, revision=revision or None, token=token)
        configs = [CONFIG_FILE, ADAPTER_CONFIG]
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=configs, token=token))
    files = HubFiles(repo_id, model, folder, commit.resolved, token)
    if not any((folder / name).is_file() for name in configs):
        held = ", ".join(list(files.sizes())[:10]) or "nothing"
        raise CheckpointError(
            f"{model}: the repository has no {CONFIG_FILE}, so it is no transformers checkpoint, and no"
            f" {ADAPTER_CONFIG}; it holds {held}"
        )
    return files


def _literally(name: str) -> str:
    """A pattern that matches only this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextmanager
def _explained(repo_id: str, where: str) -> Iterator[None]:
    """Turns what the Hub's client raises into one error that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(
            f"{where}: neither a local folder nor a Hub id like 'name/model' or 'name/model@revision' ({error})"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{where}: access to this model must be granted first; ask for it at"
            f" {constants.ENDPOINT}/{repo_id} and log in with 'hf auth login'"
        ) from error
    except DisabledRepoError as error:
        raise CheckpointError(f"{where}: the Hub has disabled this repository; use another model") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{where}: the repository exists, but has no such revision; see the branches and tags at"
            f" {constants.ENDPOINT}/{repo_id}/tree/main"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where}: neither a local folder nor a model on the Hub that you can see; check the spelling, and if it is"
            " private log in with 'hf auth login'"
        ) from error
    except (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{where}: not a local folder, not completely in the Hub's cache, and the Hub cannot be reached; go online"
            " (unset HF_HUB_OFFLINE if it is set) or give a local folder"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{where}: a file of the checkpoint is gone from the Hub ({error})") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{where}: the Hub refused ({first_line(error)}); try again later") from error
    except OSError as error:
        raise CheckpointError(f"{where}: the download failed ({first_line(error)})") from error
    except Exception as error:
        # The client's transport has errors of its own, in a package that changes between its versions.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet"):
            raise
        raise CheckpointError(
            f"{where}: the Hub cannot be reached ({first_line(error)}); check the connection and try again"
        ) from error
