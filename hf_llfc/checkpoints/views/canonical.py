"""A checkpoint in canonical form: folded norms and balanced circuits, made as its tensors are read.

Nothing is written. See `hf_llfc.symmetry.canonical` for what is done and why it does not change the function.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.views.view import View
from hf_llfc.errors import SpecError
from hf_llfc.symmetry.canonical import Canonical, CanonicalForm


def canonical_checkpoint(checkpoint: Checkpoint, form: CanonicalForm) -> Checkpoint:
    """Brings a model into canonical form, as a checkpoint of the same class.

    Args:
        checkpoint: Any checkpoint whose tensors have the names that `save_pretrained` writes.
        form: The canonical form for its config.

    Raises:
        SpecError: Its tensors do not fit the form.
    """
    try:
        binding = form.spec.bind({name: info.shape for name, info in checkpoint.tensors.items()})
        canonical = Canonical(form, binding, checkpoint.read_unrounded)
    except SpecError as error:
        raise SpecError(f"{checkpoint.label}: {error}") from None
    infos = {**checkpoint.tensors, **{name: checkpoint.tensors[source] for name, source in canonical.added.items()}}

    def make(name: str) -> torch.Tensor:
        wide = torch.promote_types(infos[name].dtype, torch.float32)
        return canonical.canonical(name).to(wide).contiguous()

    changed = [name for name in infos if name not in checkpoint.tensors or canonical.is_changed(name)]
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
        tensors=infos,
        canonical=form.spec,
        original=checkpoint,
        reindexing=reindexing,
        weights=View(checkpoint.weights, infos, frozenset(changed), make, {"canonical": 2}),
    )
