"""What a diagnosis found, as data: the JSON of ``llfc/llfc_report.json``, tables for people and for pandas."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from hf_llfc.diagnostics.rows import (
    AdditivityRow,
    AtChance,
    Barrier,
    BlockRow,
    ClassesRow,
    CommutativityRow,
    Contradiction,
    DecompositionRow,
    FoldRow,
    GeometryRow,
    ImportanceRow,
    LayerRow,
    ModelReference,
    OutputAgreement,
    PathPoint,
    SampleRow,
    SettlingRow,
    StitchingPoint,
    Suggestion,
    UnitsRow,
    Verdict,
)
from hf_llfc.errors import EvaluationError, suggest

if TYPE_CHECKING:
    import pandas

SCHEMA = "hf_llfc.report/1"

PARTS = (
    "path",
    "layers",
    "decomposition",
    "additivity",
    "commutativity",
    "stitching",
    "geometry",
    "blocks",
    "fold",
    "importance",
    "units",
    "classes",
    "settling",
    "samples",
)
"""What of a report makes a table."""

_LARGEST = sys.float_info.max

OPTIONAL = {
    *PARTS[2:],
    "at_chance",
    "outputs",
    "suggestion",
    "quantiles",
    "interval",
    "weights",
    "layer_weights",
    "name",
    "gated",
    "contradiction",
    "order",
    "cost",
    "barrier",
    "half_share",
}
"""Fields that are left out of the JSON where they are empty and their class has a default for them."""

SCHEMA_FILE = "report.schema.json"


def report_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of what `ConnectivityReport.save` writes, with a description of every value."""
    text = importlib.resources.files("hf_llfc.diagnostics").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@dataclass(frozen=True)
class ConnectivityReport:
    """Whether models are linearly connected, in loss, in metric and layer by layer in features.

    Args:
        models: The models, the one with weight α first.
        path: On a line by rising α, both ends included; otherwise the models themselves first.
        barrier: Barrier of loss and error.
        layers: Rows by layer in order of computation, then by the order of the path; the last layer is ``logits``.
        verdict: Advice, with the numbers behind it.
        region: Where merged models were measured: ``line`` between two models, ``simplex`` of more (edges and
            centre), or ``arithmetic``, sums of task vectors over a base model, which comes last.
        decomposition: The barrier taken apart at every point between the models, where they choose from classes.
        outputs: How predictions of two models and of their merge agree, at the point that the verdict is about.
        contradiction: How classifiers contradict each other, where they do.
        at_chance: Models that do no better than chance on the data, for whom there is no verdict.
        additivity: Additivity of every activation function, where asked for.
        commutativity: Commutativity of every linear map, where asked for.
        stitching: At every layer boundary, where asked for.
        geometry: Geometry of weights and features, where asked for.
        blocks: What every block has to do with the barrier, where asked for.
        fold: The ways from the models to the merge, and over it, where asked for.
        importance: Of every tensor of every model, where asked for.
        units: Those that are always or never active, where asked for.
        classes: How well every layer tells classes apart, where asked for.
        settling: After which blocks answers are settled, where asked for.
        samples: Those that carry most of the barrier, the one that carries most first; none without labels.
        suggestion: Better weights, where asked for.
        data: On which data it was measured.
        alignment: How the second model was moved onto the first; empty if it was not.
        versions: Versions of the libraries that took part.
    """

    models: tuple[ModelReference, ...]
    path: tuple[PathPoint, ...]
    barrier: Barrier
    layers: tuple[LayerRow, ...]
    verdict: Verdict
    region: str = "line"
    decomposition: tuple[DecompositionRow, ...] = ()
    outputs: OutputAgreement | None = None
    contradiction: Contradiction | None = None
    at_chance: tuple[AtChance, ...] = ()
    additivity: tuple[AdditivityRow, ...] = ()
    commutativity: tuple[CommutativityRow, ...] = ()
    stitching: tuple[StitchingPoint, ...] = ()
    geometry: tuple[GeometryRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    fold: tuple[FoldRow, ...] = ()
    importance: tuple[ImportanceRow, ...] = ()
    units: tuple[UnitsRow, ...] = ()
    classes: tuple[ClassesRow, ...] = ()
    settling: tuple[SettlingRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    suggestion: Suggestion | None = None
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
        """The layers at one point.

        Args:
            alpha: On a line, the measured α nearest to this is taken. A simplex has one centre and task arithmetic one
                edit that was asked for, the last point of the path, and that is taken.
        """
        if not self.layers:
            return ()
        if self.region != "line":
            return tuple(row for row in self.layers if row.weights == self.path[-1].weights)
        nearest = min(self.alphas, key=lambda measured: (abs(measured - alpha), measured))
        return tuple(row for row in self.layers if row.alpha == nearest)

    def rows(self, alpha: float = 0.5) -> list[dict[str, Any]]:
        """The layers at one point as flat rows for a table.

        Args:
            alpha: Weight of the first model, as for `at`.

        Returns:
            Per layer `layer`, `alpha` (`point` where it is no line), `llfc`, `llfc_std`, `baseline`, `baseline_std`,
            `ratio`, `coefficient` and `coefficient_std`.
        """
        return [self._flat(row) for row in self.at(alpha)]

    def path_rows(self) -> list[dict[str, Any]]:
        """The path as flat rows for a table: `alpha`, or `point` where it is no line, `loss`, a column per metric."""
        return [{**self._place(point), "loss": point.loss, **point.metrics} for point in self.path]

    def part_rows(self, part: str) -> list[dict[str, Any]]:
        """Any part of the report as flat rows for a table.

        Args:
            part: One of `PARTS`; ``layers`` gives one row per layer and point. A statistic `x` has the columns `x`,
                the mean, and `x_std`; where they were measured also `x_q05`, `x_q25`, … for the quantiles, and `x_low`
                and `x_high` for the interval of the mean.

        Raises:
            EvaluationError: There is no such part.
        """
        if part not in PARTS:
            raise EvaluationError(f"a report has no {part!r}{suggest(part, PARTS)}; it has {', '.join(PARTS)}")
        if part == "path":
            return self.path_rows()
        if part == "layers":
            return [{**self._flat(row), **_spreads(row)} for row in self.layers]
        return [_flat_columns(row) for row in self.to_dict().get(part, ())]

    def _place(self, of: PathPoint | LayerRow) -> dict[str, Any]:
        """Position of a point: its α on a line, its name elsewhere."""
        if self.region == "line":
            return {"alpha": of.alpha}
        names = (point.name for point in self.path if point.weights == of.weights)
        return {"point": next(names, None)}

    def _flat(self, row: LayerRow) -> dict[str, Any]:
        return {
            "layer": row.layer,
            **self._place(row),
            "llfc": row.llfc.mean,
            "llfc_std": row.llfc.std,
            "baseline": row.baseline.mean,
            "baseline_std": row.baseline.std,
            "ratio": row.ratio,
            "coefficient": row.coefficient.mean,
            "coefficient_std": row.coefficient.std,
        }

    def to_pandas(self, part: str = "layers") -> pandas.DataFrame:
        """A part of the report as a data frame.

        Args:
            part: One of `PARTS`: ``layers``, one row per layer and point; ``path``, one row per point; or a measure.

        Raises:
            EvaluationError: There is no such part.
        """
        import pandas

        return pandas.DataFrame(self.part_rows(part))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, the schema's name first; what was not measured is left out."""
        return {"schema": SCHEMA, **_plain(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConnectivityReport:
        """The report that `to_dict` gave; keys of later versions are left out.

        Raises:
            EvaluationError: It is no such report.
        """
        schema = values.get("schema")
        if schema != SCHEMA:
            raise EvaluationError(f"not a report of this version: its schema is {schema!r}, expected {SCHEMA!r}")
        given = {entry.name: values[entry.name] for entry in dataclasses.fields(cls) if entry.name in values}
        try:
            return cls(**{name: typed(value, get_type_hints(cls)[name], name) for name, value in given.items()})
        except (TypeError, ValueError) as error:  # TypeError where a part is missing
            raise EvaluationError(f"not a report that this version wrote: {error}") from error

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
            # JSON may escape half a character, which no file can hold as text, and Python's reads infinities.
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        except OSError as error:
            raise EvaluationError(f"report {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"report {path} is not JSON: {error}") from error
        if not isinstance(values, Mapping):
            raise EvaluationError(f"report {path} holds no report")
        return cls.from_dict(values)


def _spreads(row: LayerRow) -> dict[str, float]:
    statistics = {"llfc": row.llfc, "baseline": row.baseline, "coefficient": row.coefficient}
    return {
        column: value
        for name, statistic in statistics.items()
        for column, value in _spread(name, vars(statistic)).items()
    }


def _spread(name: str, statistic: Mapping[str, Any]) -> dict[str, float]:
    """Quantiles and interval of a statistic as columns."""
    columns = {f"{name}_q{level[2:]:0<2}": value for level, value in (statistic.get("quantiles") or {}).items()}
    interval = statistic.get("interval")
    return {**columns, **({f"{name}_low": interval[0], f"{name}_high": interval[1]} if interval else {})}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {entry: vars(value)[entry.name] for entry in dataclasses.fields(value)}
        return {entry.name: _plain(item) for entry, item in entries.items() if item or not _may_be_left_out(entry)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _may_be_left_out(entry: dataclasses.Field[Any]) -> bool:
    """Whether a reader gets the same from a JSON without it; a distance of weights that is 0 is no empty field."""
    has_default = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
    return has_default and entry.name in OPTIONAL


def _flat_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the mean and the spread of its statistics, and its mappings, as columns of their own."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and value.keys() >= {"mean", "std"}:
            columns |= {name: value["mean"], f"{name}_std": value["std"], **_spread(name, value)}
        elif isinstance(value, Mapping):
            columns |= value
        else:
            columns[name] = value
    return columns


def typed(value: Any, hint: Any, path: str) -> Any:
    """A JSON value as what a type hint says, with keys of later versions left out.

    Raises:
        ValueError: It is something else; the message names the place.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    hint = next(option for option in options if option is not type(None))
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        hints = get_type_hints(hint)
        known = {name: typed(value[name], hints[name], f"{path}.{name}") for name in hints if name in value}
        missing = [entry.name for entry in dataclasses.fields(hint) if entry.name not in known and _is_required(entry)]
        if missing:
            raise ValueError(f"{path}: {', '.join(missing)} missing")
        return hint(**known)
    if get_origin(hint) is Mapping and isinstance(value, Mapping):
        return {name: typed(entry, get_args(hint)[1], f"{path}.{name}") for name, entry in value.items()}
    if get_origin(hint) is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        inner = get_args(hint)
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError(f"{path}: {len(inner)} values expected, found {len(value)}")
        return tuple(typed(entry, inner[0], f"{path}[{index}]") for index, entry in enumerate(value))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return value
    if (hint in (str, bool) or (hint is int and not isinstance(value, bool))) and isinstance(value, hint):
        return value
    raise ValueError(f"{path}: {str(value)[:40]!r} is not what is expected there")


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
