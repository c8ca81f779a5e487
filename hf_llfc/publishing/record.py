"""What a run found, as typed data: results, alignments and data, and what llfc/run.json keeps to write a card again."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hf_llfc.diagnostics.report import ConnectivityReport, typed
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import LLFC_FOLDER, RUN_FILE
from hf_llfc.foundation.model_names import as_text
from hf_llfc.publishing.files import read_json
from hf_llfc.publishing.lineage import display_name, file_name, is_hub_id, relevant, split_revision

SCHEMA = "hf_llfc.run/1"

NAMED_TENSORS = 5
"""Tensors that are named one by one; of more, their modules are."""

Kind = TypeVar("Kind")


def _read(kind: type[Kind], values: Any, where: str) -> Kind:
    """JSON values as a dataclass, with keys of later versions left out."""
    try:
        value: Kind = typed(values, kind, where)
    except ValueError as error:
        raise PublishingError(str(error)) from None
    return value


@dataclass(frozen=True)
class Result:
    """Loss and metrics of one model.

    Attributes:
        id: Hub id or path.
        loss: In nats; None where it was not measured.
        metrics: By name; None where a value is not finite.
        is_merge: Whether it is the merged model.
        is_before: Whether it is the merged model before it was calibrated.
    """

    id: str
    loss: float | None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    is_merge: bool = False
    is_before: bool = False

    @property
    def is_parent(self) -> bool:
        """Whether it is one of the models that were merged."""
        return not (self.is_merge or self.is_before)


@dataclass(frozen=True)
class MovedAxis:
    """How many units of one kind of axis an alignment moves."""

    axis: str
    moved: int
    units: int


@dataclass(frozen=True)
class AlignmentSummary:
    """An alignment in numbers, as `hf_llfc.parents.provenance.alignment_summary` gives them.

    Attributes:
        method: How it was found.
        axes: What it moves.
        model: Which model it moves.
        reference: The model that stays.
        together: Of several models that were aligned at once: `star` or `universe`.
        models: How many those are.
        centre: The model in the middle of a star.
        probe_change: The largest change of an answer to random inputs, relative to the largest entry.
        probe_precision: The dtype that it was measured in.
        probe_left_out: Why it was not measured.
    """

    method: str = "alignment"
    groups: str | None = None
    objective_before: float | None = None
    objective_after: float | None = None
    distance_before: float | None = None
    distance_after: float | None = None
    cosine_before: float | None = None
    cosine_after: float | None = None
    converged: bool | None = None
    unmatched: tuple[str, ...] | None = None
    solver: str | None = None
    assignment_gap: float | None = None
    together: str | None = None
    models: int | None = None
    centre: str | None = None
    pairs_cosine_before: float | None = None
    pairs_cosine_after: float | None = None
    reference: str | None = None
    model: str | None = None
    probe_change: float | None = None
    probe_precision: str | None = None
    probe_left_out: str | None = None
    axes: tuple[MovedAxis, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AlignmentSummary:
        """Reads the summary from JSON values.

        Raises:
            PublishingError: A value is not what is expected there.
        """
        return _read(cls, values, "alignment")

    @property
    def moved(self) -> int:
        """How many units it moves."""
        return sum(axis.moved for axis in self.axes)

    @property
    def units(self) -> int:
        """How many units may move."""
        return sum(axis.units for axis in self.axes)

    def without_paths(self) -> AlignmentSummary:
        """The summary with Hub ids as they are and folders by their name."""
        model, reference, centre = (name and display_name(name) for name in (self.model, self.reference, self.centre))
        return replace(self, model=model, reference=reference, centre=centre)


def alignments_in(report: ConnectivityReport) -> list[AlignmentSummary]:
    """Every alignment that a report tells of; none where nothing was aligned.

    Raises:
        PublishingError: The report tells of something else.
    """
    if report.alignment.get("method") in (None, "none"):
        return []
    several = report.alignment.get("alignments")
    return [
        AlignmentSummary.from_dict(values) for values in (several if isinstance(several, list) else [report.alignment])
    ]


@dataclass(frozen=True)
class MeasuredData:
    """The data that a report was measured on.

    Attributes:
        task: Pipeline tag.
        dataset: Hub id, with the revision where it is known, or path.
        name: Configuration of the data set.
        split: Part of the data set.
        samples: How many samples.
        seed: Seed of the choice of samples.
        tokenizer: Name of the tokenizer; `bytes` where tokens are bytes.
        unit: What there is one feature vector of.
    """

    task: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str | None = None
    samples: int | None = None
    seed: int | None = None
    tokenizer: str | None = None
    unit: str | None = None

    @classmethod
    def of(cls, report: ConnectivityReport | None) -> MeasuredData:
        """The data of a report; all None without one.

        Raises:
            PublishingError: The report does not describe its data as this package does.
        """
        return cls() if report is None else _read(cls, report.data, "data")

    @property
    def id(self) -> str:
        """The Hub id without its revision, or the file's name."""
        name, _ = split_revision(self.dataset or "")
        return name if is_hub_id(name) else file_name(name)

    @property
    def revision(self) -> str | None:
        """The revision on the Hub, where it is known."""
        return split_revision(self.dataset or "")[1]

    @property
    def link(self) -> str | None:
        """The address of the data on the Hub, if they are there."""
        return f"https://huggingface.co/datasets/{self.id}" if is_hub_id(self.id) else None

    @property
    def full_name(self) -> str:
        """The id with the whole revision."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @property
    def short_name(self) -> str:
        """The id with seven characters of the revision."""
        return self.id if self.revision is None else f"{self.id}@{self.revision[:7]}"

    @property
    def parts(self) -> list[str]:
        """Configuration, split and number of samples, as far as they are known."""
        split = f"split {self.split}" if self.split else None
        samples = f"{self.samples} samples" if self.samples else None
        return [part for part in (self.name, split, samples) if part]


@dataclass(frozen=True)
class MapRecord:
    """What a calibration did to one affine map.

    Attributes:
        name: Of the module.
        rows: Samples, or tokens or positions of all samples, that its change was found from.
        inputs: Inputs of its matrix, which is how many parameters each of its outputs has.
        moved: Size of the change over the distance of the parents; None where these are equal.
        before: Mean squared distance from the target over the target's variance, before.
        after: The same afterwards, on the same samples.
    """

    name: str
    rows: int
    inputs: int
    moved: float | None
    before: float
    after: float


@dataclass(frozen=True)
class FittedLayer:
    """Features of a merge in one layer before and after it was calibrated.

    Attributes:
        layer: Its name.
        before: 1 − cos(merge, blend of the parents), mean over samples.
        after: The same of the calibrated merge.
        baseline: 1 − cos between the parents.
        coefficient_before: Size of the merge's features along the blend; 1 where it is as large.
        coefficient_after: The same of the calibrated merge.
    """

    layer: str
    before: float | None
    after: float | None
    baseline: float | None
    coefficient_before: float | None
    coefficient_after: float | None


@dataclass(frozen=True)
class FittedMeasures:
    """A merge before and after calibration, measured on the data of the diagnosis.

    Attributes:
        layers: In the order in which they run.
        loss_before: Loss of the merge before; None without labels.
        metrics_before: Its metrics.
        fold_loss: The barrier of the way from one parent straight to the calibrated merge, and from there to another.
        fold_error: The same of the error rate.
    """

    layers: tuple[FittedLayer, ...]
    loss_before: float | None = None
    metrics_before: Mapping[str, float | None] = field(default_factory=dict)
    fold_loss: float | None = None
    fold_error: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FittedMeasures:
        """Reads the measures from JSON values.

        Raises:
            PublishingError: A value is not what is expected there.
        """
        return _read(cls, values, "measures")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class RidgeRecord:
    """A ridge that was tried on samples that were held out.

    Attributes:
        ridge: What it was.
        divergence: Of the result from the average of what the parents answer, in nats.
        error: Standard error of its difference from the least of all.
    """

    ridge: float
    divergence: float
    error: float


@dataclass(frozen=True)
class CalibrationRecord:
    """How a merge was fitted to its parents' features.

    Attributes:
        method: `calibrate` or `repair`.
        targets: `blend` or `own`.
        samples: How many, over all processes and data.
        ridge: What held it at the merge; None of repair.
        trials: The ridges that were tried, the chosen one first; none where the recipe gave it.
        own_input: Share of a parent's own input in what its map was given to make the target.
        data: A summary of every set of samples.
        blend: The share of every parent in the target; none where each is its own.
        moved: Size of the change of all maps over the distance of the parents there; None where these are equal.
        maps: In the order in which they run.
        left: Maps that stayed → why.
        measured: The merge before and after; None where nothing was measured.
    """

    method: str
    targets: str
    samples: int
    ridge: float | None = None
    trials: tuple[RidgeRecord, ...] = ()
    own_input: float = 1.0
    data: tuple[Mapping[str, Any], ...] = ()
    blend: tuple[float, ...] = ()
    moved: float | None = None
    maps: tuple[MapRecord, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    measured: FittedMeasures | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalibrationRecord:
        """Reads the record from JSON values.

        Raises:
            PublishingError: A value is not what is expected there.
        """
        return _read(cls, values, "calibration")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class FactorsRecord:
    """The change of one weight in an adapter.

    Attributes:
        name: Of the weight in memory.
        rank: Of its factors.
        size: Norm of the change.
        error: Norm of what the factors lack of it.
    """

    name: str
    rank: int
    size: float
    error: float

    @property
    def relative(self) -> float:
        """The error as a share of the change."""
        return self.error / self.size if self.size else 0.0


@dataclass(frozen=True)
class AdapterRecord:
    """A merge that was written as an adapter.

    Attributes:
        base: What its config names as its base.
        asked: The rank that was asked for, in words.
        dtype: Of its tensors.
        factors: Of every weight that has factors.
        error: Norm of all that the adapter lacks of the change, over the norm of the change.
        saved: What it holds whole: modules, biases, rows of embeddings.
        lost: What it leaves as in the base → why.
        ways: How many weights were merged in the `subspace` of their factors, as `changes` or as whole `weights`.
        architecture: The class of the model.
        model_type: Its type.
    """

    base: str
    asked: str
    dtype: str
    factors: tuple[FactorsRecord, ...]
    error: float
    saved: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    ways: Mapping[str, int] = field(default_factory=dict)
    architecture: str | None = None
    model_type: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterRecord:
        """Reads the record from JSON values.

        Raises:
            PublishingError: A value is not what is expected there.
        """
        return _read(cls, values, "adapter")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank; 0 where no weight has factors."""
        found = [row.rank for row in self.factors] or [0]
        return min(found), max(found)


@dataclass(frozen=True)
class TensorsOf:
    """Some tensors of one model.

    Attributes:
        model: What the model is called.
        count: How many tensors.
        names: Their names, or those of the modules that they are of, at most `NAMED_TENSORS`.
    """

    model: str
    count: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: str, names: Sequence[str]) -> TensorsOf:
        """Names some tensors."""
        return cls(model, len(names), _named(names))

    @property
    def listed(self) -> str:
        """The names in words."""
        return f"{', '.join(self.names)}{', …' if len(self.names) == NAMED_TENSORS < self.count else ''}"


@dataclass(frozen=True)
class TensorsRecord:
    """What becomes of every tensor of the models.

    Attributes:
        total: Tensors of the result.
        merged: Those that come from several models.
        copied: Those that are one model's own, by the model.
        dropped: Tensors of the models that the result has not.
        buffers: How many buffers were left out, which follow from the config.
    """

    total: int
    merged: int
    copied: tuple[TensorsOf, ...] = ()
    dropped: tuple[TensorsOf, ...] = ()
    buffers: int = 0

    @property
    def sentence(self) -> str:
        """All of it in words."""
        copied = [f"{each.count} copied from {each.model} ({each.listed})" for each in self.copied] or ["0 copied"]
        dropped = [f"{each.count} of {each.model} dropped ({each.listed})" for each in self.dropped] or ["0 dropped"]
        said = ", ".join([f"{self.merged} of {self.total} tensors merged", *copied, *dropped])
        noun = "buffer" if self.buffers == 1 else "buffers"
        return f"{said}; {self.buffers} {noun} left out, which the config gives" if self.buffers else said

    def renamed(self, names: Mapping[str, str]) -> TensorsRecord:
        """The same with models called otherwise."""
        copied, dropped = (
            tuple(replace(each, model=names.get(each.model, each.model)) for each in some)
            for some in (self.copied, self.dropped)
        )
        return replace(self, copied=copied, dropped=dropped)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "sentence": self.sentence}


def _named(names: Sequence[str]) -> tuple[str, ...]:
    """A few names: those of tensors, or of the modules that hold them, with how many each holds."""
    if len(names) <= NAMED_TENSORS:
        return tuple(names)
    found: Counter[str] = Counter()
    for depth in range(max(1, *(name.count(".") for name in names)), 0, -1):
        found = Counter(".".join(name.split(".")[:depth]) for name in names)
        if len(found) <= NAMED_TENSORS:
            break
    return tuple(f"{module} ({count})" if count > 1 else module for module, count in found.most_common(NAMED_TENSORS))


@dataclass(frozen=True)
class RunRecord:
    """What a run did.

    Attributes:
        alignments: In the order of the models.
        results: Of every parent and of the merge on the same data.
        versions: Of the libraries.
        hardware: In words.
        cards: Of every parent, in the order of `lineage.models_of`, what of its own card that of the merge depends on.
        warnings: What a reader should know before using the merge, a sentence each.
        left: Files of the first parent that the merge has not.
        gone: Indices, in the same order, of the parents that were in memory, or whose files are gone.
        name: What the card calls the merge; None where that is the name of its folder.
        calibration: How the merge was fitted to its parents' features; None where it was not.
        adapter: What was written in place of a model; None where a model was.
        proofs: What the proof of each parent's adapter found, a sentence each.
        quantised: How parents were quantised, a line for each that was.
        tensors: What became of every tensor of the models; None of an adapter.
        vocabulary: What became of rows of the embeddings; None where all models have the same.
    """

    alignments: tuple[AlignmentSummary, ...] = ()
    results: tuple[Result, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str | None = None
    cards: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    gone: tuple[int, ...] = ()
    name: str | None = None
    calibration: CalibrationRecord | None = None
    adapter: AdapterRecord | None = None
    proofs: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ()
    tensors: TensorsRecord | None = None
    vocabulary: str | None = None

    def save(self, folder: Path) -> Path:
        """Writes the record into an output folder, without the paths of a disk."""
        path = folder / LLFC_FOLDER / RUN_FILE
        named = replace(
            self,
            alignments=tuple(alignment.without_paths() for alignment in self.alignments),
            results=tuple(replace(result, id=display_name(result.id)) for result in self.results),
            cards=tuple(map(relevant, self.cards)),
        )
        values = {"schema": SCHEMA, **asdict(named)}
        values["alignments"] = [
            {key: value for key, value in alignment.items() if value is not None} for alignment in values["alignments"]
        ]
        text = json.dumps(_without_nan(values), indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_text(text) + "\n", encoding="utf-8", newline="\n")
        return path

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Reads the record of an output folder; an empty one where there is none.

        Raises:
            PublishingError: The file cannot be read or is not one.
        """
        path = folder / LLFC_FOLDER / RUN_FILE
        if not path.is_file():
            return cls()
        values = read_json(path)
        missing = {"alignments", "results", "versions", "hardware", "cards"} - values.keys()
        if values.get("schema") != SCHEMA or missing:
            raise PublishingError(f"{path} is no record of a run ({SCHEMA}); delete it, or merge again")
        try:
            record = _read(cls, values, str(path))
        except PublishingError as error:
            raise PublishingError(f"{error}: it is no record of a run ({SCHEMA}); delete it, or merge again") from None
        # JSON has no NaN: a loss that was measured and not finite is null there.
        return replace(
            record,
            results=tuple(
                replace(result, loss=math.nan) if result.loss is None else result for result in record.results
            ),
        )


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
