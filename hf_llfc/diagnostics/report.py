"""What a diagnosis found, as data: the JSON of ``llfc/llfc_report.json``, tables for people and for pandas."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import EvaluationError

if TYPE_CHECKING:
    import pandas

SCHEMA = "hf_llfc.report/1"
ANSWERS = ("merge", "align", "do not merge")


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation over samples.

    Args:
        mean: None where no sample has a value (the coefficient of a blend that is zero everywhere).
        std: Divided by the number of samples.
    """

    mean: float | None
    std: float | None


@dataclass(frozen=True)
class ModelReference:
    """One of the models compared.

    Args:
        id: Hub id or path, as the user gave it.
        revision: The commit, where there is one.
        weight: Its share in the merge, where one was asked for.
    """

    id: str | None = None
    revision: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class PathPoint:
    """Loss and metrics of the merged model.

    Args:
        alpha: Weight of the first model.
        loss: Mean cross-entropy in nats; None without labels.
        metrics: By name; None where a value is not finite.
    """

    alpha: float
    loss: float | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Barrier:
    """The most by which the path lies above the line between its ends; at least 0, None without labels.

    Args:
        loss: In nats.
        error: Of the share of wrong predictions.
    """

    loss: float | None
    error: float | None


@dataclass(frozen=True)
class LayerRow:
    """How features of one layer compare at one α.

    Args:
        layer: The module's name, or ``logits``.
        alpha: Weight of the first model.
        llfc: 1 − cos(merged, blend).
        baseline: 1 − cos(A, B).
        coefficient: ⟨merged, blend⟩ / ‖blend‖², signed.
    """

    layer: str
    alpha: float
    llfc: Statistic
    baseline: Statistic
    coefficient: Statistic

    @property
    def ratio(self) -> float | None:
        """LLFC in units of its baseline; None where the parents do not differ."""
        if self.llfc.mean is None or not self.baseline.mean:
            return None
        return self.llfc.mean / self.baseline.mean


@dataclass(frozen=True)
class Verdict:
    """The answer and its evidence.

    Args:
        answer: One of `ANSWERS`.
        because: One sentence with the numbers that decided.
    """

    answer: str
    because: str


@dataclass(frozen=True)
class ConnectivityReport:
    """Whether two models are linearly connected, in loss, in metric and layer by layer in features.

    Args:
        models: The models, the one with weight α first.
        path: By rising α, both ends included.
        barrier: Of loss and error.
        layers: By layer in order of computation, then by rising α; the last layer is ``logits``.
        verdict: What to do.
        data: On which data it was measured.
        alignment: How the second model was moved onto the first; empty if it was not.
        versions: Of the libraries that took part.
    """

    models: tuple[ModelReference, ...]
    path: tuple[PathPoint, ...]
    barrier: Barrier
    layers: tuple[LayerRow, ...]
    verdict: Verdict
    data: Mapping[str, Any] = field(default_factory=dict)
    alignment: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def alphas(self) -> tuple[float, ...]:
        """Every α at which features were compared, rising."""
        return tuple(sorted({row.alpha for row in self.layers}))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Every layer, in the order of computation."""
        return tuple(dict.fromkeys(row.layer for row in self.layers))

    def at(self, alpha: float = 0.5) -> tuple[LayerRow, ...]:
        """The layers at the measured α nearest to the one asked for."""
        if not self.layers:
            return ()
        nearest = min(self.alphas, key=lambda measured: (abs(measured - alpha), measured))
        return tuple(row for row in self.layers if row.alpha == nearest)

    def rows(self, alpha: float = 0.5) -> list[dict[str, Any]]:
        """The layers at one α as flat rows for a table.

        Args:
            alpha: The measured α nearest to this is taken.

        Returns:
            Per layer `layer`, `alpha`, `llfc`, `llfc_std`, `baseline`, `baseline_std`, `ratio`, `coefficient` and
            `coefficient_std`.
        """
        return [_flat(row) for row in self.at(alpha)]

    def path_rows(self) -> list[dict[str, Any]]:
        """The path as flat rows for a table: `alpha`, `loss`, and a column per metric."""
        return [{"alpha": point.alpha, "loss": point.loss, **point.metrics} for point in self.path]

    def to_pandas(self, part: str = "layers") -> pandas.DataFrame:
        """A part of the report as a data frame.

        Args:
            part: ``layers``, one row per layer and α, or ``path``, one row per α.
        """
        import pandas

        if part not in ("layers", "path"):
            raise EvaluationError(f"a report has layers and path, not {part!r}")
        return pandas.DataFrame([_flat(row) for row in self.layers] if part == "layers" else self.path_rows())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, the schema's name first."""
        return {"schema": SCHEMA, **_plain(dataclasses.asdict(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConnectivityReport:
        """The report that `to_dict` gave; keys of later versions are left out.

        Raises:
            EvaluationError: It is no such report.
        """
        schema = values.get("schema")
        if schema != SCHEMA:
            raise EvaluationError(f"not a report of this version: its schema is {schema!r}, expected {SCHEMA!r}")
        try:
            return cls(
                models=tuple(_build(ModelReference, model) for model in values["models"]),
                path=tuple(_build(PathPoint, point) for point in values["path"]),
                barrier=_build(Barrier, values["barrier"]),
                layers=tuple(_layer_row(row) for row in values["layers"]),
                verdict=_build(Verdict, values["verdict"]),
                data=dict(values.get("data", {})),
                alignment=dict(values.get("alignment", {})),
                versions=dict(values.get("versions", {})),
            )
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"the report is incomplete: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ConnectivityReport:
        """Reads what `save` wrote.

        Raises:
            EvaluationError: The file is missing or holds no report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise EvaluationError(f"report {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise EvaluationError(f"report {path} is not JSON: {error}") from error
        if not isinstance(values, Mapping):
            raise EvaluationError(f"report {path} holds no report")
        return cls.from_dict(values)


def _flat(row: LayerRow) -> dict[str, Any]:
    return {
        "layer": row.layer,
        "alpha": row.alpha,
        "llfc": row.llfc.mean,
        "llfc_std": row.llfc.std,
        "baseline": row.baseline.mean,
        "baseline_std": row.baseline.std,
        "ratio": row.ratio,
        "coefficient": row.coefficient.mean,
        "coefficient_std": row.coefficient.std,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _build(kind: type[Any], values: Mapping[str, Any]) -> Any:
    names = {entry.name for entry in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def _layer_row(values: Mapping[str, Any]) -> LayerRow:
    statistics = {name: _build(Statistic, values[name]) for name in ("llfc", "baseline", "coefficient")}
    return LayerRow(layer=values["layer"], alpha=values["alpha"], **statistics)
