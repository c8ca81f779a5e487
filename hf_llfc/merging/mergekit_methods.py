"""The merge methods that mergekit computes: their parameters, under mergekit's own names, and what they need.

A recipe is checked against this before anything is opened, also where mergekit is not installed; a test compares it
with mergekit's own registry. https://github.com/arcee-ai/mergekit
"""

from __future__ import annotations

from dataclasses import dataclass

SWITCHES = (
    "filter_wise",
    "int8_mask",
    "normalize",
    "normalize_weights",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "rescale",
)
"""Parameters that are true or false; all others are numbers."""

SHARES = ("density", "gamma")
"""Parameters from 0 to 1."""


@dataclass(frozen=True)
class MergekitMethod:
    """What a method takes.

    Attributes:
        title: What its authors call it.
        of_merge: Parameters of the merge.
        of_model: Parameters of a model, which may also be given for all of them together.
        required: Those that have no default.
        base: Whether there is a base: `required`, `optional` or `none`.
        inputs: How many models there must be, the base included: at least, and at most where there is a limit.
    """

    title: str
    of_merge: tuple[str, ...] = ()
    of_model: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    base: str = "required"
    inputs: tuple[int, int | None] = (2, None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.of_merge, *self.of_model)


_SPARSE = ("int8_mask", "normalize", "rescale", "lambda")

MERGEKIT_METHODS = {
    "ties": MergekitMethod("TIES", _SPARSE, ("weight", "density"), ("weight",)),
    "dare_ties": MergekitMethod("DARE TIES", _SPARSE, ("weight", "density"), ("weight",)),
    "dare_linear": MergekitMethod("Linear DARE", _SPARSE, ("weight", "density"), ("weight",)),
    "breadcrumbs": MergekitMethod("Model Breadcrumbs", _SPARSE, ("weight", "density", "gamma"), ("weight",)),
    "breadcrumbs_ties": MergekitMethod(
        "Model Breadcrumbs with TIES", _SPARSE, ("weight", "density", "gamma"), ("weight",)
    ),
    "della": MergekitMethod("DELLA", _SPARSE, ("weight", "density", "epsilon"), ("weight",)),
    "della_linear": MergekitMethod("Linear DELLA", _SPARSE, ("weight", "density", "epsilon"), ("weight",)),
    "slerp": MergekitMethod("SLERP", ("t",), (), ("t",), inputs=(2, 2)),
    "nuslerp": MergekitMethod(
        "NuSLERP", ("nuslerp_row_wise", "nuslerp_flatten"), ("weight",), ("weight",), "optional", (2, 3)
    ),
    "multislerp": MergekitMethod(
        "Multi-SLERP", ("normalize_weights", "eps"), ("weight",), ("weight",), "optional", (2, None)
    ),
    "nearswap": MergekitMethod("NearSwap", ("t",), (), ("t",), inputs=(2, 2)),
    "karcher": MergekitMethod("Karcher Mean", ("max_iter", "tol"), base="none"),
    "model_stock": MergekitMethod("Model Stock", ("filter_wise",), inputs=(3, None)),
    "arcee_fusion": MergekitMethod("Arcee Fusion", inputs=(2, 2)),
    "sce": MergekitMethod("SCE", ("int8_mask", "select_topk")),
    "ram": MergekitMethod("Reinforced Agent Merging", ("epsilon",)),
    "ramplus_tl": MergekitMethod(
        "Reinforced Agent Merging Plus (Tensor-Local)", ("r", "alpha", "epsilon")
    ),
}  # fmt: skip
"""Name in a recipe → method."""
