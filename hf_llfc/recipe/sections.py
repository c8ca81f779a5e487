"""The sections of a recipe as typed, frozen data, and back to plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_llfc.foundation.choices import METHODS_WITH_DATA
from hf_llfc.merging.mergekit_methods import MERGEKIT_METHODS, MergekitMethod
from hf_llfc.merging.schedule import effective_weights
from hf_llfc.recipe.data import EvaluationConfig

MERGE_METHODS = ("linear", "task_arithmetic", *MERGEKIT_METHODS)
DTYPES = ("float64", "float32", "bfloat16", "float16")

Weight = float | tuple[float, ...]

Setting = bool | float | list[Any] | dict[str, Any]
"""A value of mergekit's, a gradient of values over the layers, or values with filters, as its YAML."""


@dataclass(frozen=True)
class WeightRule:
    """A weight for the tensors or axes that match a pattern.

    Attributes:
        filter: Shell pattern or part of a tensor's name, or the name of an axis that the tensor carries; every tensor
            where None.
        value: One weight, or a gradient over the layers.
    """

    filter: str | None
    value: Weight


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of one model.

    Attributes:
        weight: One number, a gradient over the layers, or rules of which the first that matches counts.
        settings: Of a method that mergekit computes all parameters, the weight among them, as in its YAML.
    """

    weight: Weight | tuple[WeightRule | float, ...] = 1.0
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEntry:
    """One model of the merge.

    Attributes:
        model: Hub id, `id@revision`, or a local folder; `base+adapter` for a base with an adapter of peft folded in.
        parameters: Its parameters; equal shares where no model of the recipe has a weight.
        trust_remote_code: Whether code that comes with this checkpoint may be run.
    """

    model: str
    parameters: ModelParameters | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class MergeParameters:
    """Parameters of the merge.

    Attributes:
        normalize: Whether the weights of every tensor are divided by their sum. Where None, those of a linear merge
            are, and those of task arithmetic are not.
        scale: Key `lambda`; task arithmetic: factor on every model's weight.
        settings: Of a method that mergekit computes all parameters, as in its YAML.
    """

    normalize: bool | None = None
    scale: float = 1.0
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class AlignSection:
    """How the models are brought into the coordinates of the reference.

    Attributes:
        method: One of `ALIGNMENT_METHODS`.
        reference: Index of the model that stays, or its id; task arithmetic aligns onto `base_model` instead.
        together: Of more than two models one of `TOGETHER`; two are aligned to each other whatever it says.
        axes: Patterns of the axes that may move; all symmetric axes where empty.
        exclude: Patterns of axes that stay, for example `residual`.
        groups: `permutation`, or `full`: all that the architecture allows, between models in canonical form.
        anchors: How often weight matching counts weights that hold the residual stream beside fixed axes, such as
            embeddings; where None 16 with the groups `full`, else 1.
        start: `identity`, or `activation_matching` to start weight matching from.
        solver: How wide axes are assigned, one of `SOLVERS`.
        restarts: Starts of weight matching.
        max_sweeps: Sweeps per start.
        seed: Seed of visit orders and random starts; that of the recipe if left out.
        steps: Of learned matching; 500 where None.
        learning_rate: Of learned matching; 0.01 where None.
        calibration: Data for activation, commutativity and learned matching. With labels, what is learned has a low
            loss at the merge; without, a small LLFC gap.
    """

    method: str = "weight_matching"
    reference: int | str = 0
    together: str = "reference"
    axes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: str = "permutation"
    anchors: float | None = None
    start: str = "identity"
    solver: str = "exact"
    restarts: int = 2
    max_sweeps: int = 50
    seed: int = 0
    steps: int | None = None
    learning_rate: float | None = None
    calibration: EvaluationConfig | None = None

    @property
    def uses_data(self) -> bool:
        """Whether models are run on calibration data."""
        return self.method != "none" and any(each in METHODS_WITH_DATA for each in (self.method, self.start))


@dataclass(frozen=True)
class BatchNormSection:
    """How running statistics of BatchNorm are made for merged weights.

    Attributes:
        recompute: Whether they are measured anew (REPAIR); otherwise they are averaged like weights.
        data: Calibration data; that of `diagnose` without its labels where None. Training data are best.
    """

    recompute: bool = True
    data: EvaluationConfig | None = None


@dataclass(frozen=True)
class DiagnoseSection:
    """What is measured on the merge.

    Attributes:
        data: Task and data; its keys stand in the section itself.
        alphas: The grid of α: a number of equal steps from 0 to 1, or values.
        layers: Patterns of module names; block outputs and the logits where empty.
        unit: `sample`, one feature vector a sample, or `token`, one a token.
        measures: What else to measure on a pair: any of `MEASURES`.
        offload: Whether every module reads its weights when it runs, for models that do not fit into memory.
        suggest: Whether to look for better weights: one of `SUGGESTIONS`, or None.
        batch_norm: See `BatchNormSection`.
    """

    data: EvaluationConfig
    alphas: tuple[float, ...]
    layers: tuple[str, ...] = ()
    unit: str = "sample"
    measures: tuple[str, ...] = ()
    suggest: str | None = None
    offload: bool = False
    batch_norm: BatchNormSection = field(default_factory=BatchNormSection)


@dataclass(frozen=True)
class KeepSection:
    """Layer-selective merging: where features are not connected, one model's weights stay as they are.

    Attributes:
        model: Index of the model whose weights stay.
        ratio: A block is kept where its LLFC exceeds this share of the baseline, measured on the data of `diagnose`.
    """

    model: int = 0
    ratio: float = 0.5


@dataclass(frozen=True)
class PublishSection:
    """Where the merge goes on the Hub.

    Attributes:
        repo_id: The repository.
        private: Whether a new repository is private.
        create_pr: Whether a pull request is opened instead of a commit.
        revision: The branch; the main one where None.
        tag: Names the commit.
        licence: What the card says; combined from the parents where None.
    """

    repo_id: str
    private: bool | None = None
    create_pr: bool = False
    revision: str | None = None
    tag: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run; see the module.

    Attributes:
        models: The parents; the first one's config and names are those of the result.
        output_dir: The folder to write.
        merge_method: One of `MERGE_METHODS`; `linear` and `task_arithmetic` are computed here, the others by mergekit.
        base_model: θ₀ of task arithmetic, or the base of a method that mergekit computes.
        parameters: Of the merge.
        dtype: Dtype of the result unless `out_dtype` is given; arithmetic is always exact to one rounding. That of
            the first model where None.
        out_dtype: Dtype of the result.
        tokenizer_source: Whose tokenizer and processor files are carried over: the index of a model, or a model, which
            need not be one that is merged, or `base`; the first where None. `union`: the models' vocabularies are
            united, and their embeddings with them.
        align: How the models are aligned; `method: none` where the recipe has no such section.
        diagnose: What is measured; nothing where None.
        keep_where_broken: Where the weights of one model stay; nowhere where None.
        publish: Where the result goes; nowhere where None.
        seed: For every section that gives none of its own.
        overwrite: Whether an earlier output may be replaced.
        allow_pickle: Whether models whose weights are pickled, not safetensors, may be read.
        max_shard_size: Bytes above which weights are split into several files; in YAML also as `5GB`.
        max_memory: Bytes of tensors that have to be moved or made as they are merged and may be in memory together;
            the largest one always may. In YAML also as `1GB`.
        device: Where models run, products of matching are made and tensors summed: `auto`, `cpu`, `cuda`, `cuda:1`, …;
            where None, models run where accelerate puts them, and all else is the processor's.
        log_with: Trackers of accelerate that the run is logged to, any of `TRACKERS`; see `hf_llfc.pipeline.trackers`.
        logging_dir: Where trackers write that write files, in a folder named like the output folder.
    """

    models: tuple[ModelEntry, ...]
    output_dir: str
    merge_method: str = "linear"
    base_model: str | None = None
    parameters: MergeParameters = field(default_factory=MergeParameters)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: int | str | None = None
    align: AlignSection = field(default_factory=lambda: AlignSection(method="none"))
    diagnose: DiagnoseSection | None = None
    keep_where_broken: KeepSection | None = None
    publish: PublishSection | None = None
    seed: int = 0
    overwrite: bool = False
    allow_pickle: bool = False
    max_shard_size: int = 5_000_000_000
    max_memory: int = 1 << 28
    device: str | None = None
    log_with: tuple[str, ...] = ()
    logging_dir: str = "runs"

    @property
    def mergekit_method(self) -> MergekitMethod | None:
        """What mergekit computes; None of a method that is computed here."""
        return MERGEKIT_METHODS.get(self.merge_method)

    @property
    def normalizes(self) -> bool:
        """Whether the weights of every tensor are divided by their sum."""
        return self.merge_method == "linear" if self.parameters.normalize is None else self.parameters.normalize

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weight that every model has in the merge; None where one differs among tensors, or the merge is no sum.

        Raises:
            RecipeError: The weights sum to zero and are to be divided by that.
        """
        given = [
            _one_number(entry.parameters.weight) if entry.parameters is not None else 1 / len(self.models)
            for entry in self.models
        ]
        numbers = [weight for weight in given if weight is not None]
        if self.mergekit_method is not None or len(numbers) < len(given):
            return None
        return effective_weights(numbers, normalize=self.normalizes, scale=self.parameters.scale)

    @property
    def reference_index(self) -> int:
        """Which model stays."""
        if isinstance(self.align.reference, int):
            return self.align.reference
        return [entry.model for entry in self.models].index(self.align.reference)

    @property
    def result_dtype(self) -> str | None:
        """Dtype of the written tensors; None keeps that of the first model."""
        return self.out_dtype or self.dtype

    def to_dict(self) -> dict[str, Any]:
        """As plain data that `load_recipe` reads back; defaults left out."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _one_number(weight: Weight | WeightRule | tuple[WeightRule | float, ...]) -> float | None:
    """The weight of every tensor, where it is the same for all."""
    if isinstance(weight, WeightRule):
        return None if weight.filter is not None else _one_number(weight.value)
    if isinstance(weight, tuple):
        return _one_number(weight[0]) if len(weight) == 1 else None
    return weight


def copied(value: Any) -> Any:
    """Mappings and lists of plain data that may be changed without changing what was given."""
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [copied(entry) for entry in value]
    return value


def _plain(value: Any) -> Any:
    """Dataclasses as mappings without their defaults, the diagnose section with its data spread out."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if isinstance(value, Path):
            return str(value)
        return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
    if isinstance(value, ModelParameters | MergeParameters) and value.settings:
        return copied(value.settings)
    plain: dict[str, Any] = {}
    for each in dataclasses.fields(value):
        if each.name == "settings":
            continue
        entry = vars(value)[each.name]
        default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        # A section that is there says what it does, even where that is the default.
        is_told = isinstance(value, WeightRule | ModelParameters) or (
            isinstance(value, AlignSection) and each.name == "method"
        )
        # A section without a seed takes that of the recipe.
        is_told = is_told or each.name == "seed"
        if entry == default and not is_told:
            continue
        key = "lambda" if (isinstance(value, MergeParameters) and each.name == "scale") else each.name
        if each.name == "data" and isinstance(value, DiagnoseSection | BatchNormSection):
            plain |= {
                name: part
                for name, part in _plain(entry).items()
                if name != "labels" or isinstance(value, DiagnoseSection)
            }
        else:
            plain[key] = _plain(entry)
    return plain
