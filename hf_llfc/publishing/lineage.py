"""The parents of a merge: their names, weights and licences, and what follows for the merge."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import CARD_FILE
from hf_llfc.foundation.model_names import HUB_ID, is_hub_id, parts_of, split_revision
from hf_llfc.publishing.numbers import weight_text
from hf_llfc.recipe import ModelEntry, Recipe

logger = logging.getLogger(__name__)

HUB_TIMEOUT = 10.0
PARTS = "parts"
"""Under which the metadata of two cards lie, of a base and of the adapter that is folded into it."""
LARGEST_CARD = 5_000_000
"""In bytes; a larger one is not read."""
RELEVANT = ("license", "license_name", "license_link", "language", "datasets")
"""Keys of a parent's card on which the card of the merge depends."""
_LICENSE_NAME = re.compile(r"[a-z0-9.-]+")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
_DATASET = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
# https://huggingface.co/docs/hub/repositories-licenses
KNOWN_LICENSES = frozenset(
    [
        "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
        "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
        "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
        "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
        "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl",
        "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1",
        "llama3.2", "llama3.3", "llama4", "gemma", "unknown", "other",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ParentInfo:
    """One parent, as the card names it.

    Args:
        id: Hub id, or the path of a local folder as the user gave it; `base@commit+adapter@commit` for a base with an
            adapter folded in.
        revision: The commit, for a parent on the Hub.
        weight: Its share in the merge.
        is_base: Whether it is the base of task arithmetic and not itself a parent.
        card: The metadata of its own card, as `read_parent_card` gives it; None where that was not read.
        share: In words what it was given in the merge, where that is no one weight.
        is_gone: Whether it was in memory, or its files are gone: it has no name by which others find it.
    """

    id: str
    revision: str | None = None
    weight: float | None = None
    is_base: bool = False
    card: Mapping[str, Any] | None = None
    share: str | None = None
    is_gone: bool = False

    @classmethod
    def named(cls, name: str, revision: str | None = None, **values: Any) -> ParentInfo:
        """A parent by the name that a recipe or a report gives it, which may hold its revision."""
        model_id, pinned = split_revision(name)
        return cls(model_id, revision or pinned, **values)

    @property
    def share_in_words(self) -> str:
        """Its weight, or what it was given in its place."""
        if self.is_base:
            return "base"
        return self.share or ("by layer" if self.weight is None else weight_text(self.weight))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of its own card, empty where that was not read."""
        return self.card or {}

    @property
    def parts(self) -> tuple[ParentInfo, ...]:
        """Itself; or a base and the adapter that is folded into it."""
        names = parts_of(self.id)
        if len(names) == 1:
            return (self,)
        cards = self.metadata.get(PARTS)
        cards = cards if isinstance(cards, list) and len(cards) == len(names) else [{}] * len(names)
        gone = [False, self.is_gone]  # a base that somebody named is where it was
        return tuple(
            ParentInfo.named(name, card=card, is_gone=is_gone)
            for name, card, is_gone in zip(names, cards, gone, strict=True)
        )

    @property
    def is_on_hub(self) -> bool:
        """Whether others can find it by its id."""
        if len(self.parts) > 1:
            return all(part.is_on_hub for part in self.parts)
        if self.is_gone:
            return False
        return is_hub_id(self.id) or (self.revision is not None and HUB_ID.fullmatch(self.id) is not None)

    @property
    def name(self) -> str:
        """The Hub id, or the last part of a path: a card tells nobody how a disk is laid out."""
        if len(self.parts) > 1:
            return " + ".join(part.name for part in self.parts)
        return self.id if self.is_on_hub else PurePath(self.id).name or self.id

    @property
    def link(self) -> str | None:
        """The address of its page on the Hub, where it has one."""
        return f"https://huggingface.co/{self.id}" if self.is_on_hub and HUB_ID.fullmatch(self.id) else None

    @property
    def license(self) -> str | None:
        """The licence's identifier; its own name where the Hub knows it only as `other`. Of two parts both."""
        if len(self.parts) > 1:
            stated = dict.fromkeys(part.license for part in self.parts)
            return None if None in stated else " and ".join(str(license) for license in stated)
        value = self.metadata.get("license")
        if isinstance(value, list):
            value = value[0] if len(value) == 1 else None
        if not isinstance(value, str) or value == "unknown":
            return None
        name = self.metadata.get("license_name")
        return name if value == "other" and isinstance(name, str) else value


@dataclass(frozen=True)
class License:
    """The licence that a merge can state.

    Args:
        metadata: `license`, and where needed `license_name` and `license_link`, for the card's metadata.
        problem: What a reader must be told; None where all parents agree.
    """

    metadata: Mapping[str, str]
    problem: str | None = None


def display_name(model: str) -> str:
    """The Hub id of a model, or the last part of its path: nobody is told how a disk is laid out."""
    return ParentInfo.named(model).name


def file_name(path: str) -> str:
    """The last part of a path."""
    return PurePath(path).name or path


def models_of(recipe: Recipe | None, report: ConnectivityReport | None) -> list[ParentInfo]:
    """The parents as the recipe names them, else as the report does, the base of task arithmetic last.

    Raises:
        PublishingError: Neither names any.
    """
    if recipe is None:
        named = [] if report is None else [model for model in report.models if model.id is not None]
        parents = [ParentInfo.named(str(m.id), m.revision, weight=m.weight) for m in named]
    else:
        is_settled = recipe.method is not None
        parents = [
            ParentInfo.named(
                entry.model,
                weight=weight,
                share="some layers" if recipe.parts else _settings(entry) if is_settled else None,
            )
            for entry, weight in zip(recipe.models, _weights(recipe), strict=True)
        ]
        if recipe.base is not None:
            parents.append(ParentInfo.named(recipe.base, is_base=True))
        parents = _with_those_of_documents(parents, recipe)
    if not parents:
        raise PublishingError(
            "the card must name the parents: there is neither llfc/recipe.yaml nor a report that does"
        )
    return parents


def _with_those_of_documents(parents: Sequence[ParentInfo], recipe: Recipe) -> list[ParentInfo]:
    """The parents, in place of those that other documents made the models of these documents."""
    documents = {each.output_dir: each for each in recipe.earlier}
    found: dict[str, ParentInfo] = {}
    for parent in parents:
        document = documents.get(parent.id)
        inner = [parent] if document is None else models_of(replace(document, earlier=recipe.earlier), None)
        for each in inner:
            own = (
                each if document is None else replace(each, weight=None, share=f"in {document.document}", is_base=False)
            )
            found.setdefault(own.id, own)
    return list(found.values())


def _weights(recipe: Recipe) -> list[float | None]:
    """The weight that each model has in the merge; None where it is not one number for all tensors."""
    return [None] * len(recipe.models) if recipe.weights is None else list(recipe.weights)


def _settings(entry: ModelEntry) -> str:
    """What one model was given, the weight in front and without its name."""
    settings = dict(entry.parameters.settings) if entry.parameters is not None else {}
    words = [setting_in_words(settings.pop("weight"))] if "weight" in settings else []
    words += [f"{key} {setting_in_words(value)}" for key, value in settings.items()]
    return ", ".join(words) or "–"


def setting_in_words(value: Any) -> str:
    """A parameter of a merge method, which may be one for all tensors, one a layer or one a pattern of names."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return weight_text(value)
    if isinstance(value, list | tuple) and value and all(isinstance(number, int | float) for number in value):
        return " … ".join(map(weight_text, value)) + " by layer"
    return "by tensor"


def read_parent_card(model: str, revision: str | None = None) -> dict[str, Any]:
    """The metadata of a parent's own card; empty if it has none, or if the Hub cannot be asked.

    Args:
        model: Hub id or local folder; of `base+adapter` the cards of both are under the key `PARTS`.
        revision: For a model on the Hub.
    """
    names = parts_of(model)
    if len(names) > 1:
        return {PARTS: [read_parent_card(*split_revision(name)) for name in names]}
    path = Path(model) / CARD_FILE
    if revision is not None or is_hub_id(model):
        from huggingface_hub import HfApi, try_to_load_from_cache

        cached = try_to_load_from_cache(model, CARD_FILE, revision=revision)
        if not isinstance(cached, str):
            # A missing licence is a line in the card: one question without retries, whatever goes wrong with it.
            try:
                info = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT)
            except Exception as error:  # the client lets errors of network and server through
                logger.info("%s: its card cannot be read (%s)", model, type(error).__name__)
                return {}
            return {} if info.card_data is None else info.card_data.to_dict()
        path = Path(cached)
    if not path.is_file() or path.stat().st_size > LARGEST_CARD:
        return {}
    from huggingface_hub import ModelCard

    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # a stranger's card may hold anything
        logger.warning("%s: the metadata of its card is not valid (%s)", model, type(error).__name__)
        return {}


def relevant(card: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a parent's card on which the card of the merge depends."""
    kept = {key: card[key] for key in RELEVANT if key in card}
    parts = card.get(PARTS)
    return {**kept, PARTS: [relevant(part) for part in parts]} if isinstance(parts, list) else kept


def combined_license(parents: Sequence[ParentInfo], chosen: str | None = None) -> License:
    """The licence of a merge: that of its parents where they agree.

    Args:
        parents: All of them, the base of task arithmetic included.
        chosen: What the user says it is, if anything.

    Returns:
        The metadata, and what a reader must be told where the parents disagree or say nothing.
    """
    parents = [part for parent in parents for part in parent.parts]
    stated = {parent.name: parent.license for parent in parents}
    known = list(dict.fromkeys(license for license in stated.values() if license is not None))
    silent = [name for name, license in stated.items() if license is None]
    problem = None
    if len(known) > 1:
        listed = ", ".join(f"{name}: {license or 'not stated'}" for name, license in stated.items())
        problem = f"The parents have different licences ({listed}). All of them apply to the merge: read each one."
    elif chosen is not None and known and chosen != known[0]:
        problem = (
            f"This model is published under {chosen}, but its parents are published under {known[0]}: read both "
            "licences before you use or redistribute it."
        )
    elif silent:
        problem = f"No licence is stated by {', '.join(silent)}: ask before you use or redistribute this model."
    if chosen is not None:
        return License(_license_metadata(chosen), problem)
    if len(known) > 1:
        return License({"license": "other", "license_name": "licences-of-the-parents"}, problem)
    if silent or not known:
        return License({}, problem)
    link = next((parent.metadata.get("license_link") for parent in parents if parent.license), None)
    return License(_license_metadata(known[0], link), problem)


def _license_metadata(license: str, link: Any = None) -> dict[str, str]:
    if license in KNOWN_LICENSES:
        return {"license": license}
    metadata = {"license": "other"}
    if _LICENSE_NAME.fullmatch(license):
        metadata["license_name"] = license
    if isinstance(link, str) and re.fullmatch(r"https?://[^\s<>\"']+", link):
        metadata["license_link"] = link
    return metadata


def union(parents: Sequence[ParentInfo], key: str) -> list[str]:
    """What any parent's card lists under `language` or `datasets`, without what the Hub would refuse."""
    pattern = {"language": _LANGUAGE, "datasets": _DATASET}[key]
    listed: list[Any] = []
    for part in (part for parent in parents for part in parent.parts):
        values = part.metadata.get(key)
        listed += values if isinstance(values, list) else [values]
    return list(dict.fromkeys(value for value in listed if isinstance(value, str) and pattern.fullmatch(value)))
