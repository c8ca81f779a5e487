"""A finished merge goes to the Hub: everything is checked first, committed at once and compared afterwards."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from hf_llfc.foundation.layout import CARD_FILE
from hf_llfc.publishing.hub.folder import check_folder, check_sanity
from hf_llfc.publishing.hub.preflight import (
    check_names,
    check_parents,
    parents_of,
    refuse_a_tag_that_points_elsewhere,
    warn_of_storage,
)
from hf_llfc.publishing.hub.target import Target

logger = logging.getLogger(__name__)

STALE = re.compile(r"(?:model|pytorch_model)[^/]*\.(?:safetensors|bin)(?:\.index\.json)?|llfc/.+")
"""What an earlier upload may have left that must not stay beside new weights: shards, their index, and what is ours."""


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | None = None,
    revision: str | None = None,
    tag: str | None = None,
    endpoint: str | None = None,
    force: bool = False,
) -> str:
    """Pushes an output folder to a model repository on the Hub, in one commit.

    The folder, the verdict of its diagnosis, the token, the rights on the namespace, the parents and the card's
    metadata are checked before anything is changed. What the repository holds already is not sent again, nothing is
    committed if nothing changed, and what was committed is read back and compared. An upload that was cut can simply be
    repeated.

    Args:
        folder: What a merge wrote: config, weights, README.md and llfc/.
        repo_id: "namespace/name", or a name in your own namespace.
        private: Whether a new repository is private; also a condition on one that exists. None leaves it to the Hub.
        create_pr: Opens a pull request on an existing repository instead of changing it.
        token: Of the Hub; else the one you are logged in with.
        revision: The branch to push to, created if need be; the main branch without it.
        tag: Names the commit that holds the folder; one that exists must name that commit already.
        endpoint: Of the Hub, where it is not the usual one.
        force: Pushes although the diagnosis, a private parent or a parent's licence speaks against it, or although the
            repository holds other weights.

    Returns:
        Where it lies: the address of the repository, the tag, the branch or the pull request.

    Raises:
        PublishingError: What is wrong and what to do next; then nothing was committed, unless it says so.
    """
    check_names(create_pr=create_pr, revision=revision, tag=tag)
    folder = Path(folder)
    files = check_folder(folder)
    parents = parents_of(folder)
    if not force:
        check_sanity(folder)
    target = Target.connect(repo_id, token=token, endpoint=endpoint)
    info = target.look_up(private=private, create_pr=create_pr)
    target.check_card(folder / CARD_FILE)
    if not force:
        check_parents(target, parents, private=private, info=info)
    warn_of_storage(target, sum(file.size for file in files), private=private, info=info)

    base = target.head(info, revision)
    remote = target.list_files(base) if base is not None else {}
    if not force:
        target.refuse_to_replace_a_stranger(files, remote)
    changed = [file for file in files if file.path not in remote or not file.is_stored_as(remote[file.path])]
    local = {file.path for file in files}
    stale = sorted(path for path in remote if path not in local and STALE.fullmatch(path))
    held = base if not changed and not stale else None
    tagged = target.tagged(tag) if tag is not None and info is not None else None
    if tag is not None:
        refuse_a_tag_that_points_elsewhere(target, tag, tagged, held)

    if held is not None:
        logger.info("%s holds exactly these files already; nothing to commit", target.repo_id)
        if tag is not None and tagged is None:
            target.create_tag(tag, held)
        return target.url(tag or revision)
    if create_pr and (url := target.equal_pull_request(files)) is not None:
        logger.info("%s asks for exactly these files already; nothing to commit", url)
        return url
    if info is None:
        target.create(private=private)
    if revision is not None and base is None:
        target.create_branch(revision)
    commit = target.commit(changed, stale, files, revision=revision, create_pr=create_pr, parent=base)
    target.compare(files, commit.oid)
    if tag is not None:
        target.create_tag(tag, commit.oid)
    return commit.pr_url or target.url(tag or revision)
