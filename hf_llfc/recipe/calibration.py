"""The section `calibrate` of a recipe: what of a merge is fitted to its parents' features, and on which samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_llfc.errors import EvaluationError
from hf_llfc.foundation.choices import AUTO, CALIBRATION_METHODS, TARGETS
from hf_llfc.recipe.data import EvaluationConfig
from hf_llfc.recipe.fitting import is_number
from hf_llfc.recipe.options import documented, option, settle

OF_LABELS = ("label_column", "label_map", "metric")
"""Keys of data that say something of labels, which a calibration does not look at."""


def _ridge(value: Any) -> float | str:
    if value == AUTO:
        return AUTO
    if is_number(value) or isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if 0 < number < float("inf"):
            return number
    raise ValueError("a number above 0, or auto")


@documented
@dataclass(frozen=True)
class CalibrateSection:
    """How the merge is fitted to the blend of its parents' features, on samples whose labels are never looked at."""

    data: EvaluationConfig | None = option(
        "Task and data, whose keys stand in the section itself; labels are not looked at.",
        None,
        shown="those of every model, with the targets own",
    )
    method: str = option(
        "Fit whole affine maps, or only mean and size of their channels.", "calibrate", choices=CALIBRATION_METHODS
    )
    ridge: float | str = option(
        "What holds calibration at the merge, in mean squares of the inputs of a map; auto chooses it on a quarter of "
        "the samples, which it holds out.",
        0.01,
        reads=_ridge,
        metavar="RIDGE",
    )
    layers: tuple[str, ...] = option(
        "Patterns of the modules that may change.", (), shown="all affine maps", metavar="PATTERN"
    )
    norms: bool = option(
        "Calibrate scales and shifts after every normalization too; those of BatchNorm are calibrated anyway.", False
    )
    targets: str = option(
        "What is imitated: the blend of all parents on the same samples, or each parent on its own `calibrate_on`.",
        "blend",
        choices=TARGETS,
    )
    own_input: float = option(
        "Share of a parent's own input in what its map is given to make the target; 0 takes the input of the merge "
        "(RegMean++), 0.3 the mix of FeatCal.",
        1.0,
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        settle(self, EvaluationError, self._disagreements)
        if self.data is not None:
            object.__setattr__(self, "data", replace(self.data, labels=False))

    def _disagreements(self) -> list[str]:
        problems = label_problems(self.data) if self.data is not None else []
        if self.targets == "blend" and self.data is None:
            problems.append("dataset: missing, and so is task; give unlabelled samples for the merge to be fitted on")
        if self.targets == "own" and self.data is not None:
            problems.append(
                "dataset: has no meaning with the targets own, whose samples are those that each model names by its "
                "`calibrate_on`; remove task and data here"
            )
        if self.method == "repair":
            given = {"ridge": self.ridge != 0.01, "norms": self.norms}
            problems += [f"{key}: has no meaning for repair; calibrate has one" for key, told in given.items() if told]
        return problems


def label_problems(data: EvaluationConfig) -> list[str]:
    """Settings of labels, which would be ignored."""
    return [
        f"{key}: has no meaning, since labels are not looked at; remove it"
        for key in OF_LABELS
        if vars(data)[key] is not None
    ]
