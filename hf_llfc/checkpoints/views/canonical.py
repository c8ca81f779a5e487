"""A checkpoint in canonical form: folded norms and balanced circuits, made as its tensors are read.

Nothing is written. See `hf_llfc.symmetry.canonical` for what is done and why it does not change the function.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.files import FileSpan
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.errors import SpecError
from hf_llfc.symmetry.canonical import Canonical, CanonicalForm


def canonical_checkpoint(checkpoint: Checkpoint, form: CanonicalForm) -> Checkpoint:
    """The same model in canonical form, as a checkpoint of the same class.

    Args:
        checkpoint: Any checkpoint whose tensors have the names that `save_pretrained` writes.
        form: Of its config.

    Raises:
        SpecError: Its tensors do not fit the form.
    """
    try:
        binding = form.spec.bind({name: info.shape for name, info in checkpoint.tensors.items()})
        canonical = Canonical(form, binding, checkpoint.read_unrounded)
    except SpecError as error:
        raise SpecError(f"{checkpoint.label}: {error}") from None
    weights = CanonicalWeights(checkpoint, canonical)
    settings = checkpoint.settings
    if canonical.added:
        config = copy.deepcopy(checkpoint.config)
        config.tie_word_embeddings = False
        settings = settings.with_config(config)
    reindexing = checkpoint.reindexing
    if reindexing is not None:
        known = reindexing.dimensions
        added = {name: known[source] for name, source in canonical.added.items() if source in known}
        reindexing = replace(reindexing, dimensions={**known, **added})
    return replace(
        checkpoint,
        settings=settings,
        tensors=weights.infos,
        canonical=form.spec,
        reindexing=reindexing,
        _weights=weights,
    )


class CanonicalWeights:
    """The tensors of a checkpoint in canonical form."""

    def __init__(self, checkpoint: Checkpoint, canonical: Canonical) -> None:
        """Takes what folds; nothing is read.

        Args:
            checkpoint: As it was.
            canonical: What folds it.
        """
        self._checkpoint = checkpoint
        self._canonical = canonical
        added = {name: checkpoint.tensors[source] for name, source in canonical.added.items()}
        self.infos: Mapping[str, TensorInfo] = {**checkpoint.tensors, **added}

    def identity(self) -> Mapping[str, Any]:
        """Of the files that it is made from; empty in memory."""
        files = self._checkpoint.identity().get("files", {})
        return {**files, "canonical": 2} if files else {}

    def refuse_changed(self) -> None:
        """Refuses files that were written to since they were opened."""
        self._checkpoint.refuse_changed()

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the dtype of the checkpoint."""
        return self.read_unrounded(name).to(self.infos[name].dtype)

    def read_unrounded(self, name: str) -> torch.Tensor:
        """One tensor, in float32 or better where it is folded."""
        if name in self._checkpoint.tensors and not self._canonical.is_changed(name):
            return self._checkpoint.read_unrounded(name)
        wide = torch.promote_types(self.infos[name].dtype, torch.float32)
        return self._canonical.canonical(name).to(wide).contiguous()

    def span(self, name: str) -> FileSpan | None:
        """Where the bytes of a tensor lie that is not folded."""
        if name not in self._checkpoint.tensors or self._canonical.is_changed(name):
            return None
        return self._checkpoint.span(name)
