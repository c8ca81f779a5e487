"""A repository on the Hub as something to push to: who may, what it holds, and one commit that changes it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import LLFC_FOLDER, RECIPE_FILE
from hf_llfc.foundation.version import __version__
from hf_llfc.publishing.hub.folder import LocalFile
from hf_llfc.publishing.hub.hub_errors import UnansweredError, explained
from hf_llfc.recipe import PublishSection

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import CommitInfo, ModelInfo, RepoFile

logger = logging.getLogger(__name__)

OTHER_WEIGHTS = re.compile(r"[^/]+\.(?:safetensors|bin|gguf|pt|pth|h5|msgpack)")
TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Target:
    """The repository, and the client that speaks for this user.

    Attributes:
        api: The client, which holds the token.
        repo_id: "namespace/name".
        user: What the Hub says of the token's owner.
        wanted: Branch, tag and visibility that were asked for.
    """

    api: HfApi
    repo_id: str
    user: Mapping[str, Any]
    wanted: PublishSection

    @classmethod
    def connect(cls, wanted: PublishSection, *, token: str | None = None, endpoint: str | None = None) -> Target:
        """Logs in and completes the name of the repository.

        Raises:
            PublishingError: The name is none, or nobody is logged in.
        """
        from huggingface_hub import HfApi, is_offline_mode
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
        from huggingface_hub.utils import validate_repo_id

        repo_id = wanted.repo_id
        api = HfApi(endpoint=endpoint, token=token, library_name="hf_llfc", library_version=__version__)
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise PublishingError(f"{repo_id!r} is no name of a repository: {error}") from None
        with explained("logging in"):
            if is_offline_mode():
                raise OfflineModeIsEnabled()  # before a login is asked for
            user = api.whoami()
        full_name = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        return cls(api, full_name, user, wanted)

    # -- what is looked up

    def look_up(self) -> ModelInfo | None:
        """What the Hub knows of the repository, None if there is none; and whether this user may write to it.

        Raises:
            PublishingError: The user may not, or the repository does not fit what was asked for.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        info: ModelInfo | None = None
        with explained(f"looking up {self.repo_id}"):
            try:
                info = self.api.model_info(self.repo_id)
            except RepositoryNotFoundError:
                logger.info("%s does not exist yet, or is hidden", self.repo_id)
        self._refuse_without_rights(exists=info is not None)
        if info is not None and self.wanted.private is not None and bool(info.private) != self.wanted.private:
            current, wanted = ("private", "public") if info.private else ("public", "private")
            raise PublishingError(
                f"{self.repo_id} exists and is {current}, not {wanted}: change it in its settings, or take another name"
            )
        return info

    def _refuse_without_rights(self, *, exists: bool) -> None:
        namespace, create_pr = self.repo_id.split("/")[0], self.wanted.create_pr
        token = (self.user.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise PublishingError(f"your token may only read: make one that may write at {TOKENS_PAGE}")
        if not exists and create_pr:
            raise PublishingError(f"{self.repo_id} does not exist, so no pull request can be opened: push without it")
        if create_pr:
            return
        if namespace not in self._namespaces():
            others = ", ".join(self._namespaces())
            hint = "; open a pull request instead" if exists else ""
            raise PublishingError(f"you may not write to {namespace!r}; you may write to: {others}{hint}")
        if token.get("role") == "fineGrained":
            scoped = (token.get("fineGrained") or {}).get("scoped") or []
            names = [scope["entity"].get("name") for scope in scoped if "repo.write" in scope["permissions"]]
            if not {namespace, self.repo_id} & set(names):
                raise PublishingError(
                    f"your token has no right to write to the repositories of {namespace!r}: give it that right at "
                    f"{TOKENS_PAGE}"
                )

    def _namespaces(self) -> list[str]:
        readers = ("read", "no_access")
        organizations = [org for org in self.user.get("orgs", []) if org.get("roleInOrg") not in readers]
        return [str(self.user["name"]), *(str(org["name"]) for org in organizations)]

    def is_private(self, info: ModelInfo | None) -> bool:
        """Whether what is pushed is private: as the repository is, or as was asked for where it is yet to be made."""
        return bool(self.wanted.private if info is None else info.private)

    def check_card(self, card: Path) -> None:
        """Lets the Hub validate the card's metadata before a repository is made for it."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        content = card.read_text(encoding="utf-8")
        with explained("validating the card"):
            headers = build_hf_headers(token=self.api.token, library_name="hf_llfc", library_version=__version__)
            response = get_session().post(
                f"{self.api.endpoint}/api/validate-yaml",
                json={"content": content, "repoType": "model"},
                headers=headers,
            )
            if response.status_code == 400:
                errors = response.json().get("errors", [])
                listed = "; ".join(str(error.get("message")) for error in errors)
                raise PublishingError(f"the Hub does not accept the metadata of {card}: {listed}")
            hf_raise_for_status(response)

    def head(self, info: ModelInfo | None) -> str | None:
        """The commit that the new one follows; None if the repository or the branch is yet to be made."""
        if info is None:
            return None
        revision = self.wanted.revision
        return info.sha if revision is None else self._commit_of(f"the branch {revision}", revision)

    def tagged(self) -> str | None:
        """The commit that the tag names; None if there is no such tag, or none was asked for."""
        tag = self.wanted.tag
        if tag is None:
            return None
        with explained(f"listing the tags of {self.repo_id}"):
            tags = [ref.name for ref in self.api.list_repo_refs(self.repo_id).tags]
        return self._commit_of(f"the tag {tag}", tag) if tag in tags else None

    def _commit_of(self, what: str, revision: str) -> str | None:
        from huggingface_hub.errors import RevisionNotFoundError

        with explained(f"looking up {what}"):
            try:
                return self.api.model_info(self.repo_id, revision=revision).sha
            except RevisionNotFoundError:
                return None

    def list_files(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit by path."""
        from huggingface_hub.hf_api import RepoFile

        with explained(f"listing the files of {self.repo_id}"):
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
        with explained(f"listing the pull requests of {self.repo_id}"):
            opened = list(
                self.api.get_repo_discussions(
                    self.repo_id,
                    author=str(self.user["name"]),
                    discussion_type="pull_request",
                    discussion_status="open",
                )
            )
        for request in opened:
            if request.git_reference is not None and not self.differences(files, request.git_reference):
                return request.url
        return None

    def differences(self, files: Sequence[LocalFile], commit: str) -> list[str]:
        """The files that a commit does not hold, or not with these bytes."""
        remote = self.list_files(commit)
        return [file.path for file in files if file.path not in remote or not file.is_stored_as(remote[file.path])]

    # -- what is changed

    def create(self) -> None:
        """Makes the repository."""
        with explained(f"creating {self.repo_id}"):
            self.api.create_repo(self.repo_id, private=self.wanted.private, exist_ok=True)

    def create_branch(self) -> None:
        """Makes the branch that was asked for, if it is not the main one."""
        revision = self.wanted.revision
        if revision is None:
            return
        with explained(f"creating the branch {revision}"):
            self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)

    def create_tag(self, commit: str) -> None:
        """Names a commit by the tag, if one was asked for.

        Raises:
            PublishingError: The tag could not be made; what was pushed stays.
        """
        tag = self.wanted.tag
        if tag is None:
            return
        with explained(f"the files are pushed, but tagging them {tag!r}"):
            self.api.create_tag(self.repo_id, tag=tag, revision=commit)

    def commit(
        self, changed: Sequence[LocalFile], stale: Sequence[str], files: Sequence[LocalFile], *, parent: str | None
    ) -> CommitInfo:
        """Uploads what changed and commits it at once.

        A connection that breaks while the commit is made leaves open whether it was: then the branch is looked at.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.hf_api import CommitInfo

        additions = [CommitOperationAdd(file.path, str(file.source)) for file in changed]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
        operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
        message = f"Upload a merge made with hf_llfc {__version__}"
        try:
            with explained(f"uploading to {self.repo_id}"):
                return self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    revision=self.wanted.revision,
                    create_pr=self.wanted.create_pr,
                    parent_commit=parent,
                )
        except UnansweredError:
            if self.wanted.create_pr:
                if (url := self.equal_pull_request(files)) is None:
                    raise
                oid = self._sha(f"refs/pr/{url.rsplit('/', 1)[-1]}")
            else:
                oid, url = self._sha(self.wanted.revision), None
                if self.differences(files, oid):
                    raise
                logger.info("the answer to the commit was lost, but the commit was made")
            page = f"{self.api.endpoint}/{self.repo_id}"
            return CommitInfo(f"{page}/commit/{oid}", message, "", oid, pr_url=url)

    def _sha(self, revision: str | None) -> str:
        with explained(f"looking up {self.repo_id}"):
            return str(self.api.model_info(self.repo_id, revision=revision).sha)

    def compare(self, files: Sequence[LocalFile], commit: str) -> None:
        """Reads back what was committed: every size and hash must be that of the file here.

        Raises:
            PublishingError: One is not.
        """
        if differing := self.differences(files, commit):
            raise PublishingError(
                f"{self.repo_id} at {commit[:7]} does not hold what was uploaded: {', '.join(differing[:5])} differ. "
                "Were the files changed meanwhile? Push again"
            )

    def url(self, revision: str | None) -> str:
        """The page of the repository, or of a branch or tag."""
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if revision is None else f"{page}/tree/{revision}"
