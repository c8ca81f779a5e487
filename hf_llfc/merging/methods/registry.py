"""The merge methods: one entry each, from which recipes, the command line, the engine and the documentation follow.

Parameters that mergekit has are called as there, and have its defaults.
"""

from __future__ import annotations

from dataclasses import replace

from hf_llfc.errors import RecipeError, suggest
from hf_llfc.merging.methods.declarations import (
    REQUIRED,
    Base,
    MergeMethod,
    Need,
    Parameter,
    Sees,
    with_default,
    without,
)

_WEIGHT = Parameter("weight", float, REQUIRED, "How much a model counts.", per_model=True)
_COUNTS = Parameter("weight", float, 1.0, "How much a model counts.", 0, per_model=True)
_FLOOR = Parameter(
    "floor", float, 1e-6, "Importances are raised to this share of the mean importance of the tensor.", 0
)
_NORMALIZE = Parameter("normalize", bool, True, "Whether weights are divided by their sum.")
_LAMBDA = Parameter("lambda", float, 1.0, "Factor on the whole change of the base.")
_INT8_MASK = Parameter(
    "int8_mask", bool, False, "Accepted because mergekit has it; it changes no value, and no memory here."
)
_EXACT_SIZE = Parameter(
    "exact_size",
    int,
    4096,
    "Matrices whose smaller side is longer are decomposed by a randomised search where few directions are needed.",
    low=1,
)

_THINNED = (
    _INT8_MASK,
    with_default([_NORMALIZE], "normalize", False)[0],
    Parameter("rescale", bool, False, "Whether thinned task vectors are scaled back to the l1 norm that they had."),
    _LAMBDA,
    _WEIGHT,
    Parameter("density", float, 1.0, "Share of a task vector's elements that is kept.", 0, 1, per_model=True),
)
_TRIMMED = (
    *_THINNED,
    Parameter("gamma", float, 0.01, "Share of the largest elements that is left out.", 0, 1, per_model=True),
)
_DRAWN = with_default(_THINNED, "rescale", True)
_DRAWN_BY_RANK = (
    *_DRAWN,
    Parameter(
        "epsilon",
        float,
        0.15,
        "How far the probability to be kept of the largest and the smallest element of a row is from the density.",
        0,
        1,
        per_model=True,
    ),
)
_SMALLEST_CHANGE = Parameter("epsilon", float, 1e-5, "Smaller changes of the base count as none.", 0)

_FISHER = MergeMethod(
    "fisher",
    "Fisher-Weighted Averaging",
    "Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv:2111.09832",
    "Weighted average in which every element counts by how much its model's predictions depend on it, as the "
    "squared gradient on samples says.",
    Base.NONE,
    (2, None),
    Need.PASSES,
    "linear",
    parameters=(_COUNTS, _FLOOR),
    reduces="mean importance",
    importance="fisher",
    sees=Sees.WEIGHTS,
)

_ALL = (
    MergeMethod(
        "linear",
        "Linear",
        "Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482",
        "Weighted average of the models.",
        Base.NONE,
        (1, None),
        Need.ELEMENTWISE,
        "linear",
        parameters=(_WEIGHT, _NORMALIZE),
        sees=Sees.SUBSPACE,
    ),
    _FISHER,
    replace(
        _FISHER,
        name="feedback",
        title="Layer-wise Feedback Averaging",
        paper="Weber et al., Layer-wise Feedback Propagation, 2023, arXiv:2308.12053",
        help="As `fisher`, but an element counts by its share in the reward that is sent back from the answer, "
        "gradient times weight.",
        importance="feedback",
    ),
    MergeMethod(
        "task_arithmetic",
        "Task Arithmetic",
        "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv:2212.04089",
        "The base plus a weighted sum of the models' changes of it.",
        Base.REQUIRED,
        (1, None),
        Need.ELEMENTWISE,
        "linear",
        parameters=(
            *without(_THINNED, "density", "rescale"),
            Parameter("rescale", bool, False, "Accepted because mergekit has it; nothing is thinned out."),
            Parameter(
                "density", float, 1.0, "Accepted because mergekit has it; nothing is thinned out.", 0, 1, per_model=True
            ),
        ),
        sees=Sees.SUBSPACE,
    ),
    MergeMethod(
        "passthrough",
        "Passthrough",
        "mergekit, arXiv:2403.13257",
        "One model as it is, or scaled.",
        Base.NONE,
        (1, 1),
        Need.ELEMENTWISE,
        "linear",
        parameters=(Parameter("scale", float, 1.0, "Factor on the tensor.", per_model=True),),
        sees=Sees.SUBSPACE,
    ),
    MergeMethod(
        "slerp",
        "SLERP",
        "Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985",
        "Along the arc from the base to one model.",
        Base.REQUIRED,
        (1, 1),
        Need.PASSES,
        "spherical",
        parameters=(Parameter("t", float, REQUIRED, "Where on the arc: 0 is the base, 1 the model."),),
        reduces="norms of base and model, and their inner product",
        sees=Sees.WEIGHTS,
    ),
    MergeMethod(
        "nuslerp",
        "NuSLERP",
        "mergekit, arXiv:2403.13257",
        "Along the arc between two models, or between their changes of a base.",
        Base.OPTIONAL,
        (2, 2),
        Need.PASSES,
        "spherical",
        parameters=(
            _WEIGHT,
            Parameter(
                "nuslerp_row_wise",
                bool,
                False,
                "Whether vectors run along the first dimension, not the last one, where tensors are not flattened.",
            ),
            Parameter("nuslerp_flatten", bool, True, "Whether a tensor counts as one vector."),
        ),
        reduces="norms of the two vectors, and their inner product",
        sees=Sees.SUBSPACE,
        by_row=("nuslerp_flatten", False),
    ),
    MergeMethod(
        "multislerp",
        "Multi-SLERP",
        "Goddard, Multi-SLERP, goddard.blog, 2025",
        "Towards the weighted mean direction of the models, or of their changes of a base, at their mean norm.",
        Base.OPTIONAL,
        (1, None),
        Need.PASSES,
        "spherical",
        parameters=(
            _WEIGHT,
            Parameter("normalize_weights", bool, True, "Whether weights are divided by their sum."),
            Parameter("eps", float, 1e-8, "Added to norms, and the length below which directions cancel.", 0),
        ),
        reduces="norms of the vectors, and inner products of all pairs",
        sees=Sees.SUBSPACE,
    ),
    MergeMethod(
        "karcher",
        "Karcher Mean",
        "Karcher, Riemannian Center of Mass and Mollifier Smoothing, 1977; arXiv:2603.04972",
        "The mean of the models on a sphere, at their mean norm.",
        Base.NONE,
        (1, None),
        Need.PASSES,
        "spherical",
        parameters=(
            Parameter("max_iter", int, 10, "Most steps towards the mean.", 0),
            Parameter("tol", float, 1e-5, "Angle of a step below which the mean is found.", 0),
        ),
        reduces="norms of the models, and inner products of all pairs",
        sees=Sees.WEIGHTS,
    ),
    MergeMethod(
        "model_stock",
        "Model Stock",
        "Jang et al., Model Stock, ECCV 2024, arXiv:2403.19522",
        "Between the base and the models' mean, by the angle between the models' changes.",
        Base.REQUIRED,
        (2, None),
        Need.PASSES,
        "spherical",
        parameters=(
            Parameter("filter_wise", bool, False, "Whether every row has an angle of its own."),
        ),
        reduces="norms of the changes, and inner products of all pairs",
        sees=Sees.SUBSPACE,
        by_row=("filter_wise", True),
    ),
    MergeMethod(
        "nearswap",
        "NearSwap",
        "alchemonaut, QuartetAnemoi-70B, huggingface.co, 2024",
        "The base, moved to a model where the two are near.",
        Base.REQUIRED,
        (1, 1),
        Need.ELEMENTWISE,
        "pairwise",
        parameters=(Parameter("t", float, REQUIRED, "Distance within which an element is the model's."),),
    ),
    MergeMethod(
        "arcee_fusion",
        "Arcee Fusion",
        "Arcee AI, Arcee Fusion, arcee.ai, 2025",
        "The base, with a model's elements where its changes are important.",
        Base.REQUIRED,
        (1, 1),
        Need.PASSES,
        "pairwise",
        reduces="quartiles of the importance",
        sees=Sees.WEIGHTS,
    ),
    MergeMethod(
        "ties",
        "TIES",
        "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708",
        "The largest changes of every model, where their sign agrees with the sum's.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "sparse",
        parameters=with_default(_THINNED, "normalize", True),
        reduces="every model's smallest magnitude that is kept; with rescale, l1 norms before and after",
    ),
    MergeMethod(
        "dare_ties",
        "DARE TIES",
        "Yu et al., Language Models are Super Mario, ICML 2024, arXiv:2311.03099",
        "Changes kept at random, where their sign agrees with the sum's.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "sparse",
        parameters=_DRAWN,
        random=True,
        reduces="with rescale, l1 norms before and after the draw",
    ),
    MergeMethod(
        "dare_linear",
        "Linear DARE",
        "Yu et al., Language Models are Super Mario, ICML 2024, arXiv:2311.03099",
        "Changes kept at random, added up.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "sparse",
        parameters=_DRAWN,
        random=True,
        reduces="with rescale, l1 norms before and after the draw",
    ),
    MergeMethod(
        "breadcrumbs",
        "Model Breadcrumbs",
        "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv:2312.06795",
        "Changes that are neither outliers nor small, added up.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "sparse",
        parameters=_TRIMMED,
        reduces="every model's smallest and largest magnitude that is kept; with rescale, l1 norms before and after",
    ),
    MergeMethod(
        "breadcrumbs_ties",
        "Model Breadcrumbs with TIES",
        "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv:2312.06795",
        "Changes that are neither outliers nor small, where their sign agrees with the sum's.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "sparse",
        parameters=_TRIMMED,
        reduces="every model's smallest and largest magnitude that is kept; with rescale, l1 norms before and after",
    ),
    MergeMethod(
        "della",
        "DELLA",
        "Deep et al., DELLA-Merging, 2024, arXiv:2406.11617",
        "Changes kept at random, larger ones more often, where their sign agrees with the sum's.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "sparse",
        parameters=with_default(_DRAWN_BY_RANK, "normalize", True),
        random=True,
        reduces="ranks in every row; with rescale, l1 norms before and after the draw",
    ),
    MergeMethod(
        "della_linear",
        "Linear DELLA",
        "Deep et al., DELLA-Merging, 2024, arXiv:2406.11617",
        "Changes kept at random, larger ones more often, added up.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "sparse",
        parameters=_DRAWN_BY_RANK,
        random=True,
        reduces="ranks in every row; with rescale, l1 norms before and after the draw",
    ),
    MergeMethod(
        "sce",
        "SCE",
        "Wan et al., FuseChat, 2024, arXiv:2408.07990",
        "Changes weighted by their size, where their sign agrees with the sum's.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "agreement",
        parameters=(
            _INT8_MASK,
            Parameter(
                "select_topk",
                float,
                1.0,
                "Share of the elements that vary between the models, the most varying ones, that is merged.",
                0,
                1,
            ),
        ),
        reduces="mean squares of the changes; with select_topk, the smallest variance that is kept",
    ),
    MergeMethod(
        "ram",
        "Reinforced Agent Merging",
        "Reinforced Agent Merging, 2026, arXiv:2601.13572",
        "The mean of the changes of those models that changed an element.",
        Base.REQUIRED,
        (1, None),
        Need.ELEMENTWISE,
        "agreement",
        parameters=(_SMALLEST_CHANGE,),
    ),
    MergeMethod(
        "ramplus_tl",
        "Reinforced Agent Merging Plus (Tensor-Local)",
        "Reinforced Agent Merging, 2026, arXiv:2601.13572",
        "As ram, with changes that one model alone made enlarged.",
        Base.REQUIRED,
        (1, None),
        Need.PASSES,
        "agreement",
        parameters=(
            Parameter("r", float, 0.1, "How much the ratio of shared to unique changes enlarges the unique ones."),
            Parameter("alpha", float, 0.2, "Limit of that ratio.", 0),
            _SMALLEST_CHANGE,
        ),
        reduces="counts of the elements that every model changed alone, and with others",
    ),
    MergeMethod(
        "tsv_m",
        "TSV-Merge",
        "Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv:2412.00081",
        "The top singular vectors of all changes, made orthogonal to each other.",
        Base.REQUIRED,
        (1, None),
        Need.DECOMPOSITION,
        "spectral",
        parameters=(_LAMBDA, _EXACT_SIZE),
        reduces="singular vectors of every change",
        sees=Sees.SUBSPACE,
    ),
    MergeMethod(
        "iso_c",
        "Iso-C",
        "Marczak et al., No Task Left Behind, ICML 2025, arXiv:2502.04959",
        "The sum of the changes, all its singular values made equal.",
        Base.REQUIRED,
        (1, None),
        Need.DECOMPOSITION,
        "spectral",
        parameters=(_LAMBDA,),
        reduces="singular values, and the polar factor, of the sum of the changes",
        sees=Sees.SUBSPACE,
    ),
    MergeMethod(
        "iso_cts",
        "Iso-CTS",
        "Marczak et al., No Task Left Behind, ICML 2025, arXiv:2502.04959",
        "As iso_c, with the weakest directions replaced by some of every model.",
        Base.REQUIRED,
        (1, None),
        Need.DECOMPOSITION,
        "spectral",
        parameters=(
            _LAMBDA,
            Parameter("common_space_fraction", float, 0.8, "Share of the directions that is the sum's.", 0, 1),
            _EXACT_SIZE,
        ),
        reduces="singular vectors of the sum of the changes, and of what every change has beside them",
    ),
    MergeMethod(
        "wudi",
        "WUDI-Merging, closed form (ACTMat)",
        "Cheng et al., Whoever Started the Interference Should End It, ICML 2025, arXiv:2503.08099",
        "The change that disturbs every model least on the inputs that its own change tells of.",
        Base.REQUIRED,
        (1, None),
        Need.DECOMPOSITION,
        "covariance",
        parameters=(
            _LAMBDA,
            Parameter("normalize", bool, True, "Whether every model counts alike, however large its change is."),
            Parameter("epsilon", float, 1e-6, "Ridge, as a share of the mean of the diagonal.", low=1e-9),
        ),
        reduces="products of every change with itself",
    ),
    MergeMethod(
        "ace",
        "ACE-Merging",
        "Xu et al., ACE-Merging, CVPR 2026, arXiv:2603.02945",
        "As wudi, with centred changes, a prior, and stronger leading directions where models differ much.",
        Base.REQUIRED,
        (1, None),
        Need.DECOMPOSITION,
        "covariance",
        parameters=(
            _LAMBDA,
            Parameter("epsilon", float, 0.01, "Ridge added to every covariance.", low=1e-9),
            Parameter(
                "heterogeneity", float, 0.3, "How much the sizes of the changes must differ for a refinement.", 0
            ),
            Parameter("refined_share", float, 0.3, "Share of the directions that is made equally strong.", 0, 1),
            Parameter("prior", float, 1.0, "Factor on the consensus prior.", 0),
            Parameter("center", bool, True, "Whether the mean row is taken from every change."),
            _EXACT_SIZE,
        ),
        reduces="products of every change with itself; for a refinement, singular vectors of a residual",
    ),
)  # fmt: skip

MERGE_METHODS = {method.name: method for method in _ALL}
"""Value of `merge_method` in a recipe → the method."""


def find_method(name: str) -> MergeMethod:
    """A merge method by its name.

    Args:
        name: Value of `merge_method` in a recipe.

    Returns:
        The method.

    Raises:
        RecipeError: There is none of that name; the message suggests the nearest.
    """
    if name not in MERGE_METHODS:
        nearest, known = suggest(name, MERGE_METHODS), ", ".join(MERGE_METHODS)
        raise RecipeError(f"merge_method: there is no method '{name}'{nearest} (one of {known})")
    return MERGE_METHODS[name]
