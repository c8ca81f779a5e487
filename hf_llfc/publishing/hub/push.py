"""A finished merge goes to the Hub: everything is checked first, committed at once and compared afterwards."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import CARD_FILE
from hf_llfc.publishing.card.card import rename_card
from hf_llfc.publishing.hub.folder import check_folder, check_sanity
from hf_llfc.publishing.hub.preflight import (
    check_names,
    check_parents,
    parents_of,
    refuse_a_tag_that_points_elsewhere,
    warn_of_storage,
)
from hf_llfc.publishing.hub.target import Target
from hf_llfc.recipe import PublishSection

logger = logging.getLogger(__name__)

STALE = re.compile(r"(?:model|pytorch_model)[^/]*\.(?:safetensors|bin)(?:\.index\.json)?|llfc/.+")
"""What an earlier upload may have left that must not stay beside new weights: shards, their index, and what is ours."""


def publish(
    folder: str | Path,
    where: PublishSection,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    force: bool = False,
    include: Sequence[str] = (),
) -> str:
    """Pushes an output folder to a model repository on the Hub, as `hf_llfc.publish`, which explains the arguments.

    Args:
        folder: What a merge wrote.
        where: Repository, branch, tag, and whether it is private; the licence is that of the card.
        token: Token of the Hub; else the one you are logged in with.
        endpoint: Address of the Hub, where it is not the usual one.
        force: Pushes although something speaks against it.
        include: Patterns of files that no run wrote and that are pushed all the same.

    Raises:
        PublishingError: What is wrong and what to do next; then nothing was committed, unless it says so.
    """
    check_names(where)
    folder = Path(folder)
    files = check_folder(folder, include)
    parents = parents_of(folder)
    if not force:
        check_sanity(folder)
    target = Target.connect(where, token=token, endpoint=endpoint)
    info = target.look_up()
    try:
        if rename_card(folder, target.repo_id):
            files = check_folder(folder, include)
    except PublishingError as error:
        if not force:
            raise
        logger.warning("the card is pushed as it is: %s", error)
    target.check_card(folder / CARD_FILE)
    if not force:
        check_parents(target, parents, info)
    warn_of_storage(target, sum(file.size for file in files), info)

    base = target.head(info)
    remote = target.list_files(base) if base is not None else {}
    if not force:
        target.refuse_to_replace_a_stranger(files, remote)
    changed = [file for file in files if file.path not in remote or not file.is_stored_as(remote[file.path])]
    local = {file.path for file in files}
    stale = sorted(path for path in remote if path not in local and STALE.fullmatch(path))
    held = base if not changed and not stale else None
    tagged = target.tagged() if info is not None else None
    refuse_a_tag_that_points_elsewhere(target, tagged, held)

    if held is not None:
        logger.info("%s holds exactly these files already; nothing to commit", target.repo_id)
        if tagged is None:
            target.create_tag(held)
        return target.url(where.tag or where.revision)
    if where.create_pr and (url := target.equal_pull_request(files)) is not None:
        logger.info("%s asks for exactly these files already; nothing to commit", url)
        return url
    if info is None:
        target.create()
    if base is None:
        target.create_branch()
    commit = target.commit(changed, stale, files, parent=base)
    target.compare(files, commit.oid)
    target.create_tag(commit.oid)
    return commit.pr_url or target.url(where.tag or where.revision)
