"""The sections of a recipe as typed, frozen data, and back to plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_llfc.errors import AlignmentError, EvaluationError, RecipeError
from hf_llfc.foundation.choices import (
    ALIGNMENT_METHODS,
    AUTO,
    CHAT_TEMPLATES,
    FORMS,
    GROUPS,
    LABEL_ORDERS,
    MEASURES,
    METHODS_WITH_DATA,
    SOLVERS,
    STARTS,
    SUGGESTIONS,
    TOGETHER,
    TRACKERS,
    UNION,
    UNITS,
    UNIVERSE_METHODS,
)
from hf_llfc.merging.methods import MERGE_METHODS, Base, MergeMethod
from hf_llfc.merging.schedule import effective_weights
from hf_llfc.recipe.agreement import disagreements
from hf_llfc.recipe.calibration import CalibrateSection
from hf_llfc.recipe.data import EvaluationConfig
from hf_llfc.recipe.fitting import as_rank, as_size, as_switch, is_number
from hf_llfc.recipe.options import copied, derived, documented, option, settle
from hf_llfc.recipe.slices import RANGE, ModuleSection, PartRecipe, SliceSection, read_range
from hf_llfc.recipe.tokenizer import TokenizerSection, TokenRule, TokenSource  # noqa: F401 (for docs/options.py)

SUMS = ("linear", "task_arithmetic")
"""Methods whose tensors are weighted sums, exact to one rounding, with weights that are one rule."""

DTYPES = ("float64", "float32", "bfloat16", "float16")

Weight = float | tuple[float, ...]

Setting = bool | float | list[Any] | dict[str, Any]
"""The value of a parameter, a gradient of values over the layers, or values with filters, as in the YAML."""


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
        settings: Of a method other than a sum all parameters, the weight among them, as in the YAML.
    """

    weight: Weight | tuple[WeightRule | float, ...] = 1.0
    settings: Mapping[str, Setting] = field(default_factory=dict)


@documented
@dataclass(frozen=True)
class ModelEntry:
    """One model of the merge."""

    model: str = option("Hub id, id@revision, or a folder; base+adapter with an adapter of peft folded in.")
    parameters: ModelParameters | None = option(
        "Parameters of this model: its weight as a number, a gradient over the layers, or rules of filter and value.",
        None,
        shown="equal weights where no model has one",
    )
    trust_remote_code: bool = option("Run code that comes with this checkpoint.", False)
    importance: EvaluationConfig | None = option(
        "Data that the importance of this model's weights is measured on.", None, shown="those of the recipe"
    )
    calibrate_on: EvaluationConfig | None = option(
        "Unlabelled samples of this model's task, on which a calibration with the targets own imitates it.",
        None,
        shown="none",
    )

    def __post_init__(self) -> None:
        settle(self, RecipeError)


@documented
@dataclass(frozen=True)
class MergeParameters:
    """Parameters of the merge."""

    normalize: bool | None = option(
        "Whether the weights of every tensor are divided by their sum; where left out, those of a linear merge are, "
        "and those of task arithmetic are not.",
        None,
        reads=lambda value: None if value is None else as_switch(value),
    )
    weight: Weight | tuple[WeightRule | float, ...] | None = option(
        "Weight of every model that has none of its own, in the same forms.",
        None,
        reads=lambda value: value,  # the reader of recipes judges it
        shown="equal weights",
    )
    scale: float = option("Factor on every weight of task arithmetic.", 1.0, key="lambda")
    settings: Mapping[str, Any] = option("All parameters of a method other than a sum, as in the YAML.", dict)

    def __post_init__(self) -> None:
        settle(self, RecipeError)


def uses_data(method: str, start: str, label_order: str | None) -> bool:
    """Whether a way to align runs models on calibration data."""
    by_method = method != "none" and any(each in METHODS_WITH_DATA for each in (method, start))
    return by_method or label_order == "match"


@documented
@dataclass(frozen=True)
class AlignSection:
    """How the models are brought into the coordinates of the reference."""

    method: str = option("How a model is aligned.", "weight_matching", choices=ALIGNMENT_METHODS)
    reference: int | str = option(
        "The model that stays, by index or id; task arithmetic aligns onto `base_model` instead.", 0, metavar="MODEL"
    )
    together: str = option(
        "How more than two models are aligned: each onto the reference, by way of a central model, or all at once.",
        "reference",
        choices=TOGETHER,
    )
    axes: tuple[str, ...] = option(
        "Patterns of the axes that may move.", (), shown="all symmetric axes", metavar="PATTERN"
    )
    exclude: tuple[str, ...] = option(
        "Patterns of axes that stay, for example residual.", (), shown="none", metavar="PATTERN"
    )
    groups: str = option(
        "What may transform an axis: permutations, or all that the architecture allows.", "permutation", choices=GROUPS
    )
    anchors: float | None = option(
        "How often weight matching counts weights between the residual stream and fixed axes, such as embeddings.",
        None,
        above=0,
        shown="16 with the groups full, else 1",
    )
    label_order: str = option(
        "How the classes of other models are brought into the order of the first: not, by their names in the configs, "
        "or by matching what the models answer on calibration data.",
        "keep",
        choices=LABEL_ORDERS,
    )
    start: str = option("Where weight matching starts.", "identity", choices=STARTS)
    solver: str = option(
        "How wide axes are assigned; auction stops within 1e-4 of the optimum.", "exact", choices=SOLVERS
    )
    restarts: int = option("Starts of weight matching; the best objective wins.", 2, at_least=1)
    max_sweeps: int = option("Sweeps of weight matching per start, at most.", 50, at_least=1)
    seed: int = option("Seed of visit orders and random starts.", 0, shown="the seed of the recipe")
    steps: int | None = option("Steps of learned matching.", None, at_least=1, shown="500")
    learning_rate: float | None = option("Highest learning rate of learned matching.", None, above=0, shown="0.01")
    probe: bool = option(
        "Run each aligned model on random inputs before and after it is moved, and refuse one that answers otherwise.",
        True,
    )
    calibration: EvaluationConfig | None = option(
        "Data for activation, commutativity and learned matching, and for matching classes; with labels, learned "
        "matching lowers the loss of the merge, without them its LLFC gap.",
        None,
    )

    def __post_init__(self) -> None:
        settle(self, AlignmentError, self._disagreements)

    def _disagreements(self) -> list[str]:
        problems = []
        if self.method in ("none", "activation_matching") and self.anchors is not None:
            problems.append(f"anchors: has no meaning for the method {self.method}; weights have them")
        if self.method != "learned_matching":
            problems += [
                f"{name}: has no meaning for the method {self.method}; only learned_matching learns"
                for name in ("steps", "learning_rate")
                if vars(self)[name] is not None
            ]
        if self.uses_data and self.calibration is None:
            named = [self.method, *([] if self.method == "none" else [self.start])]
            method = next((each for each in named if each in METHODS_WITH_DATA), "label_order: match")
            problems.append(f"calibration: {method.replace('_', ' ')} needs calibration data; give task and dataset")
        if self.together != "reference" and self.method == "none":
            problems.append("together: has no meaning for the method none")
        elif self.together == "universe" and self.method not in UNIVERSE_METHODS:
            problems.append(
                f"together: a universe is found by {' or '.join(UNIVERSE_METHODS)}, not by {self.method}; change one "
                "of them, or write `together: star`"
            )
        return problems

    @property
    def uses_data(self) -> bool:
        """Whether models are run on calibration data."""
        return uses_data(self.method, self.start, self.label_order)


@documented
@dataclass(frozen=True)
class BatchNormSection:
    """How running statistics of BatchNorm are made for merged weights."""

    recompute: bool = option(
        "Whether running statistics are measured anew (REPAIR); otherwise they are averaged like weights.", True
    )
    data: EvaluationConfig | None = option(
        "Calibration data, whose keys stand in the section itself; training data are best.",
        None,
        shown="those of `diagnose`, without labels",
    )

    def __post_init__(self) -> None:
        settle(self, EvaluationError)


def _alphas(value: Any) -> tuple[float, ...]:
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], int) and value[0] >= 3:
        value = value[0]  # as the command line has it
    if isinstance(value, int) and not isinstance(value, bool) and value >= 3:
        return tuple(round(step / (value - 1), 12) for step in range(value))
    if value is None:
        return _alphas(11)
    if isinstance(value, list | tuple) and value and all(is_number(each) and 0 <= each <= 1 for each in value):
        return tuple(sorted({float(each) for each in value}))
    raise ValueError("a number of at least 3 or a list of values from 0 to 1")


@documented
@dataclass(frozen=True)
class DiagnoseSection:
    """What is measured on the merge."""

    data: EvaluationConfig = option("Task and data, whose keys stand in the section itself.")
    alphas: tuple[float, ...] = option(
        "The weights α of the path: how many equal steps from 0 to 1, or values.",
        lambda: _alphas(11),
        reads=_alphas,
        shown="11",
        metavar="ALPHA",
    )
    layers: tuple[str, ...] = option(
        "Patterns of modules to compare, or attention, mlp, pre_activations.",
        (),
        shown="block outputs and logits",
        metavar="PATTERN",
    )
    unit: str = option("What has a feature vector: a sample, or a token.", "sample", choices=UNITS)
    measures: tuple[str, ...] = option(
        "What else to measure; the first four on two models only.", (), choices=MEASURES, shown="none"
    )
    suggest: str | None = option(
        "Look for better weights on half of the samples: one a model, or one a model and layer.",
        None,
        choices=SUGGESTIONS,
        shown="no",
    )
    offload: bool = option("Read weights when a module runs, for models larger than memory.", False)
    batch_norm: BatchNormSection = option("How BatchNorm is measured anew.", BatchNormSection, shown="below")

    def __post_init__(self) -> None:
        settle(self, EvaluationError)


@documented
@dataclass(frozen=True)
class KeepSection:
    """Layer-selective merging: where features are not connected, one model's weights stay as they are."""

    model: int = option("Index of the model whose weights stay.", 0, at_least=0)
    ratio: float = option(
        "A block is kept where its LLFC exceeds this share of the baseline, on the data of `diagnose`.", 0.5, above=0
    )

    def __post_init__(self) -> None:
        settle(self, RecipeError)


@documented
@dataclass(frozen=True)
class PublishSection:
    """Where the merge goes on the Hub."""

    repo_id: str = option("The repository, as NAMESPACE/NAME.")
    private: bool | None = option("Whether a new repository is private.", None, shown="as the Hub has it")
    create_pr: bool = option("Open a pull request on an existing repository instead of a commit.", False)
    revision: str | None = option(
        "Branch to push to, made where it is missing.", None, shown="the main one", metavar="BRANCH"
    )
    tag: str | None = option("Tag that names the commit; it must be new.", None, shown="none")
    license: str | None = option(
        "License that the card states.", None, shown="that of the parents where they agree", formerly=("licence",)
    )

    def __post_init__(self) -> None:
        settle(self, RecipeError)


def _no_alignment() -> AlignSection:
    return AlignSection(method="none")


@documented
@dataclass(frozen=True)
class Recipe:
    """A whole run; see the module."""

    models: tuple[ModelEntry, ...] = option(
        "The parents; the first gives config, tokenizer and names of the result. Or `slices`, or `modules`."
    )
    output_dir: str = option("The folder to write.", metavar="DIR")
    merge_method: str = option("How weights are merged.", "linear", choices=MERGE_METHODS, metavar="METHOD")
    base_model: str | None = option(
        "The base of task arithmetic, or of a method that takes differences from one; to methods without one it is the "
        "first of the models.",
        None,
        shown="none",
        metavar="MODEL",
    )
    layer_range: tuple[int, int] | None = option(
        "The layers of every model that are taken: the first and the one after the last, counted from 0.",
        None,
        reads=read_range,
        shown="all",
        metavar="RANGE",
    )
    slices: tuple[SliceSection, ...] = option(
        "In place of `models`: layers of the result, one slice after the other, each merged from its own sources.",
        (),
        shown="none",
    )
    modules: Mapping[str, ModuleSection] = option(
        "In place of `models`: parts of the model that are merged their own way, by name.", dict, shown="none"
    )
    parameters: MergeParameters = option("Parameters of the merge.", MergeParameters, shown="below")
    save_as: str = option(
        "What is written: a whole model, or an adapter of peft (LoRA) that holds what the merge changes of the base.",
        "model",
        choices=FORMS,
    )
    rank: int | str = option(
        "Rank of an adapter that is written; auto takes for every weight the smallest that keeps its change.",
        AUTO,
        reads=as_rank,
        metavar="RANK",
    )
    max_error: float | None = option(
        "In place of a rank: error of each weight's change, relative to the change.", None, above=0, at_most=1
    )
    dtype: str | None = option(
        "Dtype of the result, unless `out_dtype` is given; arithmetic is exact to one rounding.",
        None,
        choices=DTYPES,
        shown="that of the first model",
    )
    out_dtype: str | None = option("Dtype of the result.", None, choices=DTYPES, shown="that of `dtype`")
    tokenizer_source: int | str | None = option(
        "Whose tokenizer and processor go with the result: a model, its index, base, or the union of all vocabularies; "
        "the rows of all models are brought to its ids.",
        None,
        shown="0, the first model",
        metavar="MODEL",
    )
    tokenizer: TokenizerSection | None = option(
        "More about the tokens of the result: rules of single ones, and rows added at the end.", None, shown="nothing"
    )
    chat_template: str | None = option(
        f"Chat template of the result: auto takes the most frequent one of the models; {', '.join(CHAT_TEMPLATES)}; or "
        "the text of a template in Jinja.",
        None,
        shown="that of the tokenizer",
        metavar="TEMPLATE",
    )
    prove: bool = option("Run each base with its adapter as peft does and folded, and refuse other answers.", True)
    tie_word_embeddings: bool | None = option(
        "Whether the output head is the embedding; false writes a head, for a model without one its embedding.",
        None,
        shown="as the configs of the models say",
    )
    override_architecture: Mapping[str, str] = option(
        "Model class to take in place of the one that a config names, by the model's name.", dict, shown="none"
    )
    trust_remote_code: bool = option(
        "Run code that comes with any of the checkpoints; on the command line also that of a metric.", False
    )
    align: AlignSection = option("How the models are aligned.", _no_alignment, shown="not aligned")
    calibrate: CalibrateSection | None = option(
        "How the merge is fitted to its parents' features before it is written.", None, shown="not fitted"
    )
    diagnose: DiagnoseSection | None = option("What is measured.", None, shown="nothing")
    importance: EvaluationConfig | None = option(
        "Data that `fisher` and `feedback` measure the importance of weights on; without labels, labels are drawn from "
        "what each model predicts.",
        None,
        shown="none",
    )
    keep_where_broken: KeepSection | None = option("Where the weights of one model stay.", None, shown="nowhere")
    publish: PublishSection | None = option("Where the result goes on the Hub.", None, shown="nowhere")
    seed: int = option("Seed of every section that has none of its own.", 0, formerly=("random_seed",))
    overwrite: bool = option("Replace an earlier output, never a folder of something else.", False)
    allow_pickle: bool = option("Read weights that are pickled, where you trust their author.", False)
    max_shard_size: int = option(
        "Size above which weights are split into several files.",
        5_000_000_000,
        reads=as_size,
        shown="5GB",
        metavar="SIZE",
    )
    max_memory: int = option(
        "Memory for tensors that are moved or made as they are merged; the largest one is always held.",
        1 << 28,
        reads=as_size,
        shown="256MiB",
        metavar="SIZE",
    )
    device: str | None = option(
        "Where models run, matching multiplies and tensors are summed: auto, cpu, cuda, cuda:1.",
        None,
        shown="models where accelerate puts them, all else on the processor",
    )
    log_with: tuple[str, ...] = option("Trackers of accelerate to log to as well.", (), choices=TRACKERS, shown="none")
    logging_dir: str = option("Folder of the trackers that write files.", "runs", metavar="DIR")
    document: str | None = option(
        "What the card calls the result, and other documents of the same file.",
        None,
        key="name",
        shown="the name of its repository or folder",
    )
    parts: tuple[PartRecipe, ...] = derived(
        "What slices and modules come down to, a merge each; none where `models` is one merge of whole models.", ()
    )
    range_path: str = derived("Where the layers of all models stand, for messages.", RANGE, compare=False)
    earlier: tuple[Recipe, ...] = derived("Documents of the same file whose results are made first, in this order.", ())

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, TokenizerSection) and self.tokenizer_source is None:
            source, tokenizer = self.tokenizer.source, dataclasses.replace(self.tokenizer, source=None)
            object.__setattr__(self, "tokenizer_source", UNION if source is None else source)
            object.__setattr__(self, "tokenizer", None if tokenizer == TokenizerSection() else tokenizer)
        settle(self, RecipeError, lambda: disagreements(self))

    @property
    def columns(self) -> int:
        """How many models are merged at most, the base not counted; of slices, how many sources."""
        return max((len(part.recipe.models) for part in self.parts), default=len(self.models))

    @property
    def method(self) -> MergeMethod | None:
        """How tensors are merged; None where they are weighted sums of one λ and one way to normalize.

        Of several methods the first that is no sum.
        """
        if self.parts:
            return next((part.recipe.method for part in self.parts if part.recipe.method is not None), None)
        is_sum = self.merge_method in SUMS and not self.parameters.settings
        return None if is_sum else MERGE_METHODS[self.merge_method]

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is written, not a model."""
        return self.save_as == FORMS[1]

    @property
    def measures_importance(self) -> bool:
        """Whether models are run on data to weigh their elements."""
        if self.parts:
            return any(part.recipe.measures_importance for part in self.parts)
        return self.method is not None and bool(self.method.importance)

    @property
    def importance_data(self) -> tuple[EvaluationConfig | None, ...]:
        """The data that the importance of each model is measured on: its own, else those of the recipe."""
        return tuple(entry.importance or self.importance for entry in self.models)

    @property
    def calibration_data(self) -> tuple[EvaluationConfig, ...]:
        """The data that the merge is calibrated on: those of the section, or one a model; none where it is not."""
        if self.calibrate is None:
            return ()
        given = [self.calibrate.data, *(entry.calibrate_on for entry in self.models)]
        return tuple(each for each in given if each is not None)

    @property
    def base(self) -> str | None:
        """The base model beside the models; to a method without one it is among them, and first."""
        is_among = not self.parts and MERGE_METHODS[self.merge_method].base is Base.NONE
        return None if is_among else self.base_model

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
        if self.parts:
            return None
        of_all = 1 / max(len(self.models), 1) if self.parameters.weight is None else self.parameters.weight
        given = [
            _one_number(entry.parameters.weight if entry.parameters is not None else of_all) for entry in self.models
        ]
        numbers = [weight for weight in given if weight is not None]
        if self.method is not None or len(numbers) < len(given):
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


def _plain(value: Any) -> Any:
    """Dataclasses as mappings without their defaults, the diagnose section with its data spread out."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if isinstance(value, Path):
            return str(value)
        return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
    if isinstance(value, ModelParameters | MergeParameters) and value.settings:
        return copied(value.settings)
    plain: dict[str, Any] = {}
    for each in dataclasses.fields(value):
        # Models of slices and modules stand there; their recipes are made from them.
        if each.name in ("settings", "parts", "earlier", "range_path") or (
            each.name == "models" and isinstance(value, Recipe) and value.parts
        ):
            continue
        entry = vars(value)[each.name]
        default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        # A section that is there says what it does, even where that is the default.
        is_told = isinstance(value, WeightRule | ModelParameters) or (
            isinstance(value, AlignSection) and each.name == "method"
        )
        # A section without a seed takes that of the recipe.
        is_told = is_told or each.name in ("seed", "alphas")
        if entry == default and not is_told:
            continue
        described = each.metadata.get("option")
        key = described.key if described is not None and described.key else each.name
        if each.name == "data" and isinstance(value, DiagnoseSection | BatchNormSection | CalibrateSection):
            plain |= {
                name: part
                for name, part in _plain(entry).items()
                if name != "labels" or isinstance(value, DiagnoseSection)
            }
        else:
            plain[key] = _plain(entry)
    return plain
