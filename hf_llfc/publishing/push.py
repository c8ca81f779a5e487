"""A finished merge goes to the Hub: everything is checked first, committed at once and compared afterwards."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import PublishingError, raise_all
from hf_llfc.limited_yaml import read_yaml
from hf_llfc.publishing.card import LLFC_FOLDER, RECIPE_FILE, REPORT_FILE
from hf_llfc.publishing.facts import merge_point, model_points, not_finite, read_report
from hf_llfc.publishing.parents import CARD_FILE, is_hub_id, split_revision

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import CommitInfo, ModelInfo, RepoFile

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
STALE = re.compile(r"(?:model|pytorch_model)[^/]*\.(?:safetensors|bin)(?:\.index\.json)?|llfc/.+")
"""What an earlier upload may have left that must not stay beside new weights: shards, their index, and what is ours."""
OTHER_WEIGHTS = re.compile(r"[^/]+\.(?:safetensors|bin|gguf|pt|pth|h5|msgpack)")
FAR_ABOVE = 1.5
"""A merge whose loss is more than this many times that of its worst parent is taken for broken."""
FAR_ABOVE_NATS = 0.1
CHUNK = 8 * 1024 * 1024
_TOKEN = re.compile(r"(?<=Bearer )\S+|\b(?:hf|api)_[A-Za-z0-9_]{6,}")


@dataclass(frozen=True)
class LocalFile:
    """One file that is to be uploaded.

    Args:
        path: Its path in the repository.
        source: Where it lies.
        size: In bytes.
    """

    path: str
    source: Path
    size: int

    def is_stored_as(self, remote: RepoFile) -> bool:
        """Whether the repository holds exactly these bytes."""
        if remote.size != self.size:
            return False
        return self.sha256 == remote.lfs.sha256 if remote.lfs is not None else self.git_id == remote.blob_id

    @cached_property
    def sha256(self) -> str:
        """By which the Hub knows a large file."""
        return self._hash(hashlib.sha256())

    @cached_property
    def git_id(self) -> str:
        """By which the Hub knows a small file."""
        return self._hash(hashlib.sha1(b"blob %d\0" % self.size))

    def _hash(self, digest: Any) -> str:
        with self.source.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return str(digest.hexdigest())


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    force: bool = False,
) -> str:
    """Pushes an output folder to a model repository on the Hub, in one commit.

    The folder, the verdict of its diagnosis, the token, the rights on the namespace and the card's metadata are checked
    before anything is changed. What the repository holds already is not sent again, nothing is committed if nothing
    changed, and what was committed is read back and compared. An upload that was cut can simply be repeated.

    Args:
        folder: What a merge wrote: config, weights, README.md and llfc/.
        repo_id: "namespace/name", or a name in your own namespace.
        private: Whether a new repository is private; also a condition on one that exists. None leaves it to the Hub.
        create_pr: Opens a pull request on an existing repository instead of changing it.
        token: Of the Hub; else the one you are logged in with.
        revision: The branch to push to, created if need be; the main branch without it.
        endpoint: Of the Hub, where it is not the usual one.
        force: Pushes although the diagnosis advises against it, or although the repository holds other weights.

    Returns:
        Where it lies: the address of the repository, the branch or the pull request.

    Raises:
        PublishingError: What is wrong and what to do next; then nothing was committed.
    """
    if create_pr and revision is not None:
        raise PublishingError("a pull request goes to the main branch: give either create_pr or a revision, not both")
    folder = Path(folder)
    files = check_folder(folder)
    if not force:
        check_diagnosis(folder)
    target = _Target.connect(repo_id, token=token, endpoint=endpoint)
    info = target.look_up(private=private, create_pr=create_pr)
    target.check_card(folder / CARD_FILE)
    if not force:
        target.refuse_to_publish_private_parents(folder, private=private, info=info)
    base = target.head(info, revision)
    remote = target.list_files(base) if base is not None else {}
    if not force:
        target.refuse_to_replace_a_stranger(files, remote)
    changed = [file for file in files if file.path not in remote or not file.is_stored_as(remote[file.path])]
    local = {file.path for file in files}
    stale = sorted(path for path in remote if path not in local and STALE.fullmatch(path))
    if info is not None and base is not None and not changed and not stale:
        logger.info("%s holds exactly these files already; nothing to commit", target.repo_id)
        return target.url(revision)
    if create_pr and (url := target.equal_pull_request(files)) is not None:
        logger.info("%s asks for exactly these files already; nothing to commit", url)
        return url
    if info is None:
        target.create(private=private)
    if revision is not None and base is None:
        target.create_branch(revision)
    commit = target.commit(changed, stale, files, revision=revision, create_pr=create_pr, parent=base)
    target.compare(files, commit.oid)
    return commit.pr_url or target.url(revision)


def check_access(repo_id: str, *, private: bool | None = None, create_pr: bool = False) -> None:
    """Checks, before there is anything to push, that a push may go there.

    Args:
        repo_id: As for `publish`.
        private: As for `publish`.
        create_pr: As for `publish`.

    Raises:
        PublishingError: The name is none, nobody is logged in, or the repository is not to be written to.
    """
    _Target.connect(repo_id, token=None, endpoint=None).look_up(private=private, create_pr=create_pr)


# -- what is checked without the network


def check_folder(folder: Path) -> list[LocalFile]:
    """Every file of an output folder, if that is a whole one.

    Files and folders whose name starts with a dot are left out: no merge writes any.

    Args:
        folder: The output folder.

    Returns:
        Its files, by path.

    Raises:
        PublishingError: Everything that is missing, cut off or does not belong there, at once.
    """
    if not folder.is_dir():
        raise PublishingError(f"{folder} is not a folder; give the output folder of a merge")
    problems: list[str] = []
    files: list[LocalFile] = []
    skipped: list[str] = []
    for source in sorted(folder.rglob("*")):
        path = source.relative_to(folder)
        if any(part.startswith(".") for part in path.parts):
            skipped += [path.as_posix()] if source.is_file() else []
        elif source.is_symlink():
            problems.append(f"{path} is a link; only what lies in the folder itself is uploaded: copy the file")
        elif source.is_file():
            files.append(LocalFile(path.as_posix(), source, source.stat().st_size))
    if skipped:
        logger.warning("not uploaded, because the name starts with a dot: %s", ", ".join(skipped))
    present = {file.path for file in files}
    for name, hint in (
        ("config.json", "it is no checkpoint"),
        (CARD_FILE, "write the card with `hf_llfc.publishing.write_card`"),
        (f"{LLFC_FOLDER}/{RECIPE_FILE}", "only what hf_llfc merged is published with it"),
    ):
        if name not in present:
            problems.append(f"{name} is missing: {hint}")
    problems += _weight_problems(folder, present)
    raise_all(problems, PublishingError, f"{folder} cannot be published")
    return files


def _weight_problems(folder: Path, present: set[str]) -> list[str]:
    """What is wrong with the safetensors files: missing, cut off, or not what the index says."""
    if WEIGHTS_INDEX in present:
        try:
            weight_map = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = {
                str(shard): {name for name, at in weight_map.items() if at == shard} for shard in weight_map.values()
            }
        except (ValueError, KeyError, AttributeError, TypeError):
            return [f"{WEIGHTS_INDEX} is not an index of shards"]
    elif WEIGHTS in present:
        shards = {WEIGHTS: set()}
    else:
        return [f"there are no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}"]
    problems = []
    for shard, expected in sorted(shards.items()):
        if shard not in present:
            problems.append(f"{shard} is missing, which {WEIGHTS_INDEX} names")
            continue
        try:
            found = _tensor_names(folder / shard)
        except ValueError as error:
            problems.append(f"{shard} {error}")
            continue
        if missing := sorted(expected - found):
            problems.append(
                f"{shard} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
    return problems


def _tensor_names(path: Path) -> set[str]:
    """The tensors that a safetensors file holds in full, from its header and its length.

    Raises:
        ValueError: The file is cut off or is not one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"is cut off or no safetensors file: {size} bytes")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("has no valid header") from None
    expected = 8 + length + max(tensors.values(), default=0)
    if size != expected:
        raise ValueError(f"is {size} bytes long, its header says {expected}: merge again")
    return set(tensors)


def check_diagnosis(folder: Path) -> None:
    """Refuses a merge that its own diagnosis calls broken; without a diagnosis there is nothing to refuse.

    Args:
        folder: The output folder.

    Raises:
        PublishingError: A number is not finite, the loss is far above the parents', or the verdict is not to merge.
    """
    path = folder / LLFC_FOLDER / REPORT_FILE
    if not path.is_file():
        return
    try:
        report = read_report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise PublishingError(f"{path} cannot be read ({error}); diagnose again, or delete it and the card") from None
    reasons = []
    if broken := not_finite(report):
        reasons.append("not every number is finite: " + ", ".join(broken[:3]))
    merged = merge_point(report)
    losses = [point.loss for point in model_points(report) if point is not None and point.loss is not None]
    if merged is not None and merged.loss is not None and losses:
        worst = max(losses)
        if merged.loss > FAR_ABOVE * worst and merged.loss > worst + FAR_ABOVE_NATS:
            reasons.append(f"the loss of the merge is {merged.loss:.4g}, that of its worst parent {worst:.4g}")
    if report.verdict.answer == "do not merge":
        reasons.append(f"the verdict is not to merge: {report.verdict.because}")
    if reasons:
        raise PublishingError(
            f"{folder} is not fit to be published: {'; '.join(reasons)}. To push it all the same, force it"
        )


# -- what needs the Hub


@dataclass(frozen=True)
class _Target:
    """The repository, and the client that speaks for this user."""

    api: HfApi
    repo_id: str
    user: Mapping[str, Any]

    @classmethod
    def connect(cls, repo_id: str, *, token: str | None, endpoint: str | None) -> _Target:
        """Logs in and completes the name of the repository."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        api = HfApi(endpoint=endpoint, token=token, library_name="hf_llfc", library_version=_version())
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise PublishingError(f"{repo_id!r} is no name of a repository: {error}") from None
        with _explained("logging in"):
            user = api.whoami()
        full_name = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        return cls(api, full_name, user)

    def look_up(self, *, private: bool | None, create_pr: bool) -> ModelInfo | None:
        """What the Hub knows of the repository, None if there is none; and whether this user may write to it.

        Raises:
            PublishingError: The user may not, or the repository does not fit what was asked for.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        namespace = self.repo_id.split("/")[0]
        info: ModelInfo | None = None
        with _explained(f"looking up {self.repo_id}"):
            try:
                info = self.api.model_info(self.repo_id)
            except RepositoryNotFoundError:
                logger.info("%s does not exist yet, or is hidden", self.repo_id)
        role = ((self.user.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise PublishingError(
                "your token may only read: make one that may write at https://huggingface.co/settings/tokens"
            )
        if info is None and create_pr:
            raise PublishingError(f"{self.repo_id} does not exist, so no pull request can be opened: push without it")
        if not create_pr and namespace not in self._namespaces():
            others = ", ".join(self._namespaces())
            hint = "; open a pull request instead" if info is not None else ""
            raise PublishingError(f"you may not write to {namespace!r}; you may write to: {others}{hint}")
        if info is not None and private is not None and bool(info.private) != private:
            found, wanted = ("private", "public") if info.private else ("public", "private")
            raise PublishingError(
                f"{self.repo_id} exists and is {found}, not {wanted}: change it in its settings, or take another name"
            )
        return info

    def _namespaces(self) -> list[str]:
        readers = ("read", "no_access")
        organizations = [org for org in self.user.get("orgs", []) if org.get("roleInOrg") not in readers]
        return [str(self.user["name"]), *(str(org["name"]) for org in organizations)]

    def check_card(self, card: Path) -> None:
        """Lets the Hub validate the card's metadata before a repository is made for it."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        content = card.read_text(encoding="utf-8")
        with _explained("validating the card"):
            headers = build_hf_headers(token=self.api.token, library_name="hf_llfc", library_version=_version())
            response = get_session().post(
                f"{self.api.endpoint}/api/validate-yaml",
                json={"content": content, "repoType": "model"},
                headers=headers,
            )
            if response.status_code == 400:
                found = response.json().get("errors", [])
                listed = "; ".join(str(error.get("message")) for error in found)
                raise PublishingError(f"the Hub does not accept the metadata of {card}: {listed}")
            hf_raise_for_status(response)

    def refuse_to_publish_private_parents(self, folder: Path, *, private: bool | None, info: ModelInfo | None) -> None:
        """A merge holds its parents' weights: what is private must not become public by merging."""
        from huggingface_hub.errors import HfHubHTTPError

        will_be_private = bool(info.private) if info is not None else bool(private)
        if will_be_private:
            return
        for parent in _parents_in(folder):
            with _explained(f"looking up the parent {parent}"):
                try:
                    found = self.api.model_info(parent)
                except HfHubHTTPError as error:
                    if error.response.status_code >= 429:
                        raise
                    continue  # a folder of that name, or a repository that is gone
            if found.private:
                raise PublishingError(
                    f"the parent {parent} is private, the merge would be public: push it privately, or force it"
                )
            if found.gated:
                logger.warning("the parent %s is gated: its terms hold for the merge too", parent)

    def head(self, info: ModelInfo | None, revision: str | None) -> str | None:
        """The commit that the new one follows; None if the repository or the branch is yet to be made."""
        from huggingface_hub.errors import RevisionNotFoundError

        if info is None:
            return None
        if revision is None:
            return info.sha
        with _explained(f"looking up the branch {revision}"):
            try:
                return self.api.model_info(self.repo_id, revision=revision).sha
            except RevisionNotFoundError:
                return None

    def list_files(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit by path."""
        from huggingface_hub.hf_api import RepoFile

        with _explained(f"listing the files of {self.repo_id}"):
            entries = list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def refuse_to_replace_a_stranger(self, files: Sequence[LocalFile], remote: Mapping[str, RepoFile]) -> None:
        """Weights that were not pushed by this program are not overwritten."""
        is_ours = f"{LLFC_FOLDER}/{RECIPE_FILE}" in remote
        weights = sorted(path for path in remote if OTHER_WEIGHTS.fullmatch(path))
        if is_ours or not weights:
            return
        local = {file.path: file for file in files}
        if all(path in local and local[path].is_stored_as(remote[path]) for path in weights):
            return
        raise PublishingError(
            f"{self.repo_id} already holds other weights ({', '.join(weights[:3])}) that hf_llfc did not merge: take "
            "another name, open a pull request from a fork, or force it"
        )

    def equal_pull_request(self, files: Sequence[LocalFile]) -> str | None:
        """An open pull request of this user that asks for exactly these files, if there is one."""
        with _explained(f"listing the pull requests of {self.repo_id}"):
            opened = list(
                self.api.get_repo_discussions(
                    self.repo_id,
                    author=str(self.user["name"]),
                    discussion_type="pull_request",
                    discussion_status="open",
                )
            )
        for request in opened:
            if request.git_reference is None:
                continue
            remote = self.list_files(request.git_reference)
            if all(file.path in remote and file.is_stored_as(remote[file.path]) for file in files):
                return request.url
        return None

    def create(self, *, private: bool | None) -> None:
        """Makes the repository."""
        with _explained(f"creating {self.repo_id}"):
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)

    def create_branch(self, revision: str) -> None:
        """Makes a branch off the main one."""
        with _explained(f"creating the branch {revision}"):
            self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)

    def commit(
        self,
        changed: Sequence[LocalFile],
        stale: Sequence[str],
        files: Sequence[LocalFile],
        *,
        revision: str | None,
        create_pr: bool,
        parent: str | None,
    ) -> CommitInfo:
        """Uploads what changed and commits it at once.

        A connection that breaks while the commit is made leaves open whether it was: then the branch is looked at.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.hf_api import CommitInfo

        additions = [CommitOperationAdd(file.path, str(file.source)) for file in changed]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
        operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
        message = f"Upload a merge made with hf_llfc {_version()}".rstrip()
        try:
            with _explained(f"uploading to {self.repo_id}"):
                return self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
        except _Unanswered:
            if create_pr:
                if (url := self.equal_pull_request(files)) is None:
                    raise
                number = url.rsplit("/", 1)[-1]
                oid = self._sha(f"refs/pr/{number}")
            else:
                oid, url = self._sha(revision), None
                if not self._differences(files, oid):
                    logger.info("the answer to the commit was lost, but the commit was made")
                else:
                    raise
            page = f"{self.api.endpoint}/{self.repo_id}"
            return CommitInfo(f"{page}/commit/{oid}", message, "", oid, pr_url=url)

    def _sha(self, revision: str | None) -> str:
        with _explained(f"looking up {self.repo_id}"):
            return str(self.api.model_info(self.repo_id, revision=revision).sha)

    def _differences(self, files: Sequence[LocalFile], commit: str) -> list[str]:
        remote = self.list_files(commit)
        return [file.path for file in files if file.path not in remote or not file.is_stored_as(remote[file.path])]

    def compare(self, files: Sequence[LocalFile], commit: str) -> None:
        """Reads back what was committed: every size and hash must be that of the file here."""
        differing = self._differences(files, commit)
        if differing:
            raise PublishingError(
                f"{self.repo_id} at {commit[:7]} does not hold what was uploaded: {', '.join(differing[:5])} differ. "
                "Were the files changed meanwhile? Push again"
            )

    def url(self, revision: str | None) -> str:
        """The page of the repository, or of a branch."""
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if revision is None else f"{page}/tree/{revision}"


class _Unanswered(PublishingError):
    """A request may or may not have taken effect: the connection broke, or the Hub failed after accepting it."""


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turns whatever the client raises into one message that says what to do, without a token in it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except PublishingError:
        raise
    except LocalTokenNotFoundError:
        raise PublishingError("you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise PublishingError("the Hub's client is set to offline: unset HF_HUB_OFFLINE to push") from None
    except HfHubHTTPError as error:
        raise _http_problem(doing, error) from None
    except Exception as error:
        raise _other_problem(doing, error) from None


def _http_problem(doing: str, error: Any) -> PublishingError:
    """The message for an answer of the Hub that is an error."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import parse_ratelimit_headers

    status = error.response.status_code
    said = _without_token(error.server_message or "").strip().splitlines()
    because = f" ({said[0].rstrip('.')})" if said else ""
    if isinstance(error, GatedRepoError):
        return PublishingError(f"{doing} failed: the repository is gated{because}; ask for access on its page")
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return PublishingError(f"{doing} failed: the Hub does not accept your token{because}; run `hf auth login`")
    if status == 403:
        return PublishingError(f"{doing} failed: you have no right to{because}; check the token and the namespace")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return PublishingError(f"{doing} failed: not found{because}; check the name and the rights of your token")
    if status == 412:
        return PublishingError(f"{doing} failed: somebody committed meanwhile; push again")
    if status == 429:
        limit = parse_ratelimit_headers(error.response.headers)
        wait = error.response.headers.get("Retry-After") or (limit.reset_in_seconds if limit is not None else None)
        when = f"in {wait} seconds" if wait else "later"
        return PublishingError(f"{doing} failed: too many requests; push again {when}, what is uploaded stays")
    if status >= 500:
        return _Unanswered(f"{doing} failed: the Hub has a problem ({status}); push again, what is uploaded stays")
    return PublishingError(f"{doing} failed: the Hub answered {status}{because}")


def _other_problem(doing: str, error: Exception) -> PublishingError:
    """The message for everything else: the client wraps what happens to an upload in its own errors."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _http_problem(f"{doing}: {_first_line(error)}", cause)
        # The client changed its HTTP library between releases, so that its errors cannot be named here.
        if type(cause).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore") or isinstance(cause, OSError):
            reason = f"{type(cause).__name__}: {_first_line(cause)}" if str(cause) else type(cause).__name__
            return _Unanswered(f"{doing} failed: the connection broke ({reason}); push again, what is uploaded stays")
        cause = cause.__cause__
    return PublishingError(f"{doing} failed: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = _without_token(str(error)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _without_token(text: str) -> str:
    return _TOKEN.sub("…", text)


def _parents_in(folder: Path) -> list[str]:
    """The ids in a recipe that may be repositories on the Hub."""
    recipe = read_yaml(folder / LLFC_FOLDER / RECIPE_FILE, PublishingError)
    try:
        named = [entry["model"] for entry in recipe["models"]] + [recipe.get("base_model")]
    except (AttributeError, TypeError, KeyError) as error:
        raise PublishingError(f"{folder / LLFC_FOLDER / RECIPE_FILE} is no recipe: {error}") from None
    ids = [split_revision(str(model))[0] for model in named if model]
    return [model for model in dict.fromkeys(ids) if is_hub_id(model)]


def _version() -> str:
    try:
        return importlib.metadata.version("hf-llfc")
    except importlib.metadata.PackageNotFoundError:
        return ""
