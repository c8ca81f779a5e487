"""What can be known before a push, and before the merge that it is to push: names, rights, parents, licences, sizes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import LLFC_FOLDER, RECIPE_FILE
from hf_llfc.foundation.model_names import is_hub_id
from hf_llfc.publishing.files import read_recipe
from hf_llfc.publishing.hub.hub_errors import explained
from hf_llfc.publishing.hub.target import Target
from hf_llfc.publishing.lineage import ParentInfo, combined_license, models_of, read_parent_card
from hf_llfc.publishing.record import RunRecord
from hf_llfc.recipe import PublishSection, Recipe

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)

# https://git-scm.com/docs/git-check-ref-format
_NO_REF = re.compile(r"(?:^|/)[.-]|\.\.|//|@\{|[\x00-\x20\x7f~^:?*\[\\]|(?:\.|/|\.lock)$|^/|^@?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_DERIVATIVES = re.compile(r"cc-by-(?:nc-)?nd-.*")
FREE_PRIVATE_STORAGE = 100 * 10**9
"""In bytes, of an account that does not pay; https://huggingface.co/docs/hub/storage-limits."""


def check_access(where: PublishSection, parents: Sequence[str]) -> None:
    """Checks, before there is anything to push, that a push may go there.

    Args:
        where: The repository. Its tag must not exist, since what it would name is yet to be made.
        parents: What is to be merged, as a recipe names it.

    Raises:
        PublishingError: A name is none, nobody is logged in, the repository is not to be written to, or the parents
            must not be published.
    """
    check_names(where)
    target = Target.connect(where)
    info = target.look_up()
    if info is not None:
        refuse_a_tag_that_points_elsewhere(target, target.tagged(), None)
    check_parents(target, [ParentInfo.named(parent) for parent in parents], info)


def check_names(where: PublishSection) -> None:
    """Checks what needs no network.

    Raises:
        PublishingError: Options exclude each other, or a branch or tag cannot be called that.
    """
    if where.create_pr and where.revision is not None:
        raise PublishingError("a pull request goes to the main branch: give either create_pr or a revision, not both")
    if where.create_pr and where.tag is not None:
        raise PublishingError(
            "a pull request has no commit of its own to tag: give either create_pr or a tag, not both"
        )
    for what, name in (("branch", where.revision), ("tag", where.tag)):
        if name is not None and (_NO_REF.search(name) or _COMMIT.fullmatch(name) or name.startswith("refs/")):
            raise PublishingError(f"{name!r} is no name of a {what}: take letters, digits, '.', '_', '-' and '/'")


def refuse_a_tag_that_points_elsewhere(target: Target, commit: str | None, pushed: str | None) -> None:
    """A tag does not move.

    Args:
        target: The repository, with the tag that was asked for.
        commit: What the tag names; None if it is yet to be made.
        pushed: The commit that holds what is to be pushed; None if it is yet to be made.

    Raises:
        PublishingError: The tag names something else.
    """
    if commit is not None and commit != pushed:
        raise PublishingError(
            f"the tag {target.wanted.tag!r} of {target.repo_id} names another commit ({commit[:7]}), and tags do not "
            "move: take another"
        )


def parents_in(recipe: Recipe) -> list[str]:
    """The models that a recipe names, the base of task arithmetic included."""
    named = [entry.model for entry in recipe.models] + [recipe.base or ""]
    documents = {each.output_dir: parents_in(each) for each in recipe.earlier}
    leaves = [leaf for name in filter(None, named) for leaf in documents.get(name, [name])]
    return list(dict.fromkeys(leaves))


def parents_of(folder: Path) -> list[ParentInfo]:
    """The models that an output folder was merged from, with what the run noted of their cards.

    Raises:
        PublishingError: What is in the folder is no recipe.
    """
    record = RunRecord.load(folder)
    parents = models_of(read_recipe(folder / LLFC_FOLDER / RECIPE_FILE), None)
    cards = record.cards if len(record.cards) == len(parents) else [None] * len(parents)
    return [
        replace(parent, card=card, is_gone=index in record.gone)
        for index, (parent, card) in enumerate(zip(parents, cards, strict=True))
    ]


def check_parents(target: Target, parents: Sequence[ParentInfo], info: ModelInfo | None) -> None:
    """A merge holds its parents' weights: what they forbid, the merge may not do.

    Args:
        target: Where the merge goes.
        parents: Models of the Hub and folders; of a folder that is gone counts what is known of its card.
        info: What the Hub says of the repository, if it exists.

    Raises:
        PublishingError: The merge would be public, and a parent is private or its licence forbids derivatives.
    """
    read: list[ParentInfo] = []
    is_public = not target.is_private(info)
    for part in (part for parent in parents for part in parent.parts):
        name, revision = part.id, part.revision
        if part.is_gone or not is_hub_id(name):
            card = dict(part.metadata) if part.is_gone else read_parent_card(name) or dict(part.metadata)
        elif (hosted := _look_up_parent(target, name)) is None:
            continue
        else:
            card = hosted.card_data.to_dict() if hosted.card_data is not None else {}
            if hosted.private and is_public:
                raise PublishingError(
                    f"the parent {name} is private, the merge would be public: push it privately, or force it"
                )
            if hosted.gated:
                logger.warning("the parent %s is gated: its terms hold for the merge too", name)
        parent = ParentInfo(name, revision, card=card)
        read.append(parent)
        if is_public and parent.license is not None and _NO_DERIVATIVES.fullmatch(parent.license):
            raise PublishingError(
                f"the licence of {parent.name} ({parent.license}) does not allow sharing derivatives, and a merge is "
                "one: push it privately, or force it if its author permits it"
            )
    if read and (problem := combined_license(read).problem):
        logger.warning("%s", problem)


def _look_up_parent(target: Target, name: str) -> ModelInfo | None:
    """What the Hub says of a parent; None if it is a folder that is gone, or a repository that is."""
    from huggingface_hub.errors import HfHubHTTPError

    with explained(f"looking up the parent {name}"):
        try:
            return target.api.model_info(name)
        except HfHubHTTPError as error:
            if error.response.status_code >= 429:
                raise
    return None


def warn_of_storage(target: Target, size: int, info: ModelInfo | None) -> None:
    """Warns that private storage is limited; the Hub does not tell how much of it is left.

    Args:
        target: Where the merge goes.
        size: Size of the upload in bytes.
        info: What the Hub says of the repository, if it exists.
    """
    pays = bool(target.user.get("isPro") or target.user.get("canPay"))
    is_own = target.repo_id.split("/")[0] == target.user["name"]
    if target.is_private(info) and size > FREE_PRIVATE_STORAGE and is_own and not pays:
        logger.warning(
            "%.0f GB are to be stored privately, and a free account has %.0f GB: the Hub may refuse them",
            size / 1e9,
            FREE_PRIVATE_STORAGE / 1e9,
        )
