"""Which files beside config and weights go with a merge, and what stays behind.

The first model gives all of them, but tokenizer and processor, for which a recipe may name another. Modules of
sentence-transformers with weights of their own (a dense layer behind the pooling, say) go along where all models have
the same bytes, are summed as the models are where one number a model says how, and stay behind otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.chat_templates import SUPERSEDED
from hf_llfc.checkpoints.companions import by_name, is_licence, is_of_inputs, needed_code
from hf_llfc.checkpoints.files import GENERATION_FILE, LocalFiles, Weights, open_safetensors
from hf_llfc.checkpoints.source import Source
from hf_llfc.errors import CheckpointError
from hf_llfc.merging import Merge
from hf_llfc.parents.opening import Models
from hf_llfc.recipe import Recipe

_TEXT = (".json", ".txt", ".md", ".jinja", ".py")
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Carried:
    """What goes with a merge.

    Attributes:
        files: Path below the output folder → the file to copy there.
        sums: Path below the output folder → how the weights there come from those of the models.
        left: Names of what stays behind.
        reason: Why the modules of a SentenceTransformer are among them; None where they are not.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    sums: Mapping[str, Merge] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    reason: str | None = None

    @cached_property
    def weights(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The weights that are summed: path below the output folder → tensors by name.

        Raises:
            CheckpointError: A tensor is not finite, or leaves the range of its dtype.
        """
        return {name: dict(merge.tensors()) for name, merge in self.sums.items()}


def carried(opened: Models, recipe: Recipe) -> Carried:
    """Finds what goes with a merge.

    Args:
        opened: The models.
        recipe: How they are merged.

    Raises:
        CheckpointError: Two files of the same name are needed, or the weights of a module cannot be read.
    """
    first, source = opened.parents[0], opened.tokenizer_source
    files = by_name(first.companion_files)
    if source is not first:
        files = _with_inputs_of(source, files)
    if opened.union is not None and opened.union.source is not None:
        # It names tokens by ids, which are those of this vocabulary.
        files = {name: path for name, path in files.items() if name != GENERATION_FILE}
        files |= {name: path for name, path in by_name(source.companion_files).items() if name == GENERATION_FILE}
    if opened.chat_template is not None:
        files = {name: path for name, path in files.items() if name not in SUPERSEDED}
    sums: dict[str, Merge] = {}
    unequal = _unequal(opened)
    left = list(first.left_files)
    reason = _reason_to_leave(unequal, opened, recipe)
    if reason is not None:
        left += [name for name in first.side_files if not is_licence(name)]
        files |= {name: path for name, path in first.side_files.items() if is_licence(name)}
    else:
        sums = {name: _sum(name, opened, recipe) for name in unequal}
        files |= {name: path for name, path in first.side_files.items() if name not in sums}
    return Carried(files, sums, tuple(left), reason)


def _with_inputs_of(source: Checkpoint, files: Mapping[str, Path]) -> dict[str, Path]:
    """Companions with tokenizer and processor of another model, and the code that these need."""
    given = by_name(source.companion_files)
    of_inputs = {name: path for name, path in given.items() if is_of_inputs(name)}
    code = needed_code({**of_inputs, **{name: path for name, path in given.items() if name.endswith(".py")}})
    for name, path in code.items():
        if name in files and files[name].read_bytes() != path.read_bytes():
            raise CheckpointError(
                f"tokenizer_source: {source.label} and the first model need different code of the name {name}; take the"
                " tokenizer of the first, or rename the file of one"
            )
    return {**{name: path for name, path in files.items() if not is_of_inputs(name)}, **of_inputs, **code}


def _unequal(opened: Models) -> list[str]:
    """The files with weights of a first model's modules that another model has not byte by byte."""
    first, *others = opened.all
    return [
        name
        for name, path in first.side_files.items()
        if path.suffix not in _TEXT
        and not is_licence(name)
        and any(
            (own := other.side_files.get(name)) is None or own.read_bytes() != path.read_bytes() for other in others
        )
    ]


def _reason_to_leave(unequal: Sequence[str], opened: Models, recipe: Recipe) -> str | None:
    """Why the modules of a SentenceTransformer cannot go along; None if they can."""
    first = opened.parents[0]
    has_weights = any(path.suffix not in _TEXT for name, path in first.side_files.items() if not is_licence(name))
    if recipe.align.method != "none" and (unequal or (has_weights and first is not opened.reference)):
        return "weights behind the model would have to be aligned with it"
    if not unequal:
        return None
    if any(not name.endswith(_WEIGHTS) or any(name not in each.side_files for each in opened.all) for name in unequal):
        return f"{unequal[0]} is not the same in all models"
    if opened.sections or recipe.method is not None or recipe.weights is None or recipe.keep_where_broken is not None:
        return f"{unequal[0]} differs between the models, and the recipe has no one weight a model to sum it with"
    stored = [[_opened(each, name).infos for each in opened.all] for name in unequal]
    shapes = [[{name: info.shape for name, info in infos.items()} for infos in row] for row in stored]
    if any(each != row[0] for row in shapes for each in row):
        return f"{unequal[0]} has other tensors in another model"
    return None


def _opened(checkpoint: Checkpoint, name: str) -> Weights:
    path = checkpoint.side_files[name]
    return open_safetensors(LocalFiles(f"{checkpoint.label}/{name.rpartition('/')[0]}", path.parent), path.name)


def _sum(name: str, opened: Models, recipe: Recipe) -> Merge:
    """How weights beside those of the model come from the models."""
    weights = recipe.weights
    assert weights is not None, "one number a model"

    def source(checkpoint: Checkpoint) -> Source:
        own = _opened(checkpoint, name)
        return Source(checkpoint.label, own.read, own.span, lambda _: None)

    infos = _opened(opened.parents[0], name).infos
    base = source(opened.base) if opened.base is not None else None
    return Merge([source(each) for each in opened.parents], infos, dict.fromkeys(infos, weights), base)
