"""Repair and calibration: the features of a merge brought to the blend of its parents', in closed form.

Each affine map of the merge is changed in the order in which they run, so that on unlabelled samples its output comes
nearest to the blend Σ αₘ fₘ of what the same map of its parents gives out, which is what LLFC asks for (Zhou et al.,
NeurIPS 2023). Its input is that of the merge, with all maps before already changed; each parent runs on its own.

    calibrate   weight and bias by ridge regression towards the merge
    repair      a factor a channel, and a shift where the map has a bias, that bring mean and size of the output to
                those of the blend (REPAIR, Jordan et al., ICLR 2023)

Shape legend: s rows (samples, or samples × tokens or positions), g groups of channels, i inputs of a group, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.calibration.affine import change, groups_of, inputs_of, outputs_of, parameters_of, scale
from hf_llfc.calibration.maps import AffineMap, Plan, plan_maps
from hf_llfc.calibration.moments import ChannelMoments, Moments
from hf_llfc.calibration.replay import Replay, chains_that_hold
from hf_llfc.diagnostics.features.trial import Layer
from hf_llfc.diagnostics.measures.linear_maps import CONVOLUTIONS
from hf_llfc.diagnostics.streaming import IN_ONE_PROCESS, Execution, attention_mask
from hf_llfc.errors import EvaluationError, raise_all, suggest

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """How a merge is calibrated.

    Attributes:
        method: ``calibrate`` or ``repair``.
        ridge: Weight of staying as the merge is, in units of the mean square of the inputs; above 0.
        layers: Shell patterns of modules that may change; all where empty.
        norms: Whether scales and shifts after every normalization change too, not those of batch normalization alone.
        stream: Whether what is added to a residual stream is compared as the stream.
        own: Share of a parent's own input in what its map is given to make the target, from 0 to 1: 1 takes what the
            parent gives out on its own run, 0 what its map makes of the merge's input (RegMean++), .3 the mix of both
            that FeatCal (arXiv:2605.13030) uses.
        memory: Bytes for targets of a block; where they do not fit, parents run once for every stage.
    """

    method: str = "calibrate"
    ridge: float = 0.01
    layers: tuple[str, ...] = ()
    norms: bool = False
    stream: bool = True
    own: float = 1.0
    memory: int = 1 << 30


DEFAULTS = Settings()


@dataclass(frozen=True)
class Source:
    """Samples, and the blend of parents that is the target on them.

    Attributes:
        batches: Batches with the numbers of their samples.
        weights: α, one a parent; they sum to one.
    """

    batches: Sequence[tuple[Batch, Tensor]]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class MapChange:
    """What became of one map.

    Attributes:
        name: Of the module.
        rows: Rows that its change was found from.
        inputs: Inputs of its matrix.
        change: Norm of the change.
        apart: Mean distance of the parents' weights.
        before: Mean squared distance from the target over the target's variance, as the map was.
        after: The same with the change, on the same samples.
    """

    name: str
    rows: int
    inputs: int
    change: float
    apart: float
    before: float
    after: float

    @property
    def moved(self) -> float | None:
        """Norm of the change over the mean distance of the parents' weights; None where these are equal."""
        return self.change / self.apart if self.apart else None


@dataclass(frozen=True)
class Calibration:
    """What calibration made of a model.

    Attributes:
        changes: One a map, in the order of execution.
        left: Linear maps that stay as they are → why.
    """

    changes: tuple[MapChange, ...]
    left: Mapping[str, str]


@dataclass(frozen=True)
class Finished:
    """A part of a calibration that is done: the maps of a block, or of some of its stages.

    Attributes:
        changes: One a map.
        tensors: The new weights and biases by their names in memory.
    """

    changes: tuple[MapChange, ...]
    tensors: Mapping[str, Tensor]


def calibrate_model(
    model: PreTrainedModel,
    parents: Sequence[PreTrainedModel],
    sources: Sequence[Source],
    settings: Settings = DEFAULTS,
    *,
    execution: Execution = IN_ONE_PROCESS,
    finished: Sequence[Finished] = (),
    on_finished: Callable[[Finished], None] | None = None,
) -> Calibration:
    """Changes the affine maps of a merge, one after the other.

    Args:
        model: The merge; changed in place.
        parents: In its coordinates.
        sources: Samples of this process.
        settings: How.
        execution: Processes and progress.
        finished: What an earlier calibration from the same had done when it was interrupted, in its order.
        on_finished: Called on every process with each part that is done, those of `finished` not among them.

    Returns:
        What was changed.

    Raises:
        EvaluationError: There is nothing to calibrate, a pattern matches nothing, or a feature is not finite.
    """
    items = [(batch, ids, source.weights) for source in sources for batch, ids in source.batches]
    if not items:
        raise EvaluationError("calibration needs samples, and there are none")
    _refuse_unmatched(model, settings.layers)
    by_channel = settings.method == "repair"
    plan = plan_maps(
        model,
        items[0][0],
        layers=settings.layers,
        norms=settings.norms and not by_channel,
        stream=settings.stream and not by_channel,
    )
    if not plan.maps:
        raise EvaluationError(f"{type(model).__name__} has no affine map that could be calibrated")
    chains = chains_that_hold(model, plan.chains, items[0][0])
    work = _Work(model, parents, items, settings, plan, chains, execution)
    changes: list[MapChange] = []
    for part in finished:
        work.take_over(part)
        changes += part.changes
    for stages in work.groups():
        execution.progress("calibrating", work.done, len(plan.stages))
        part = work.calibrated(stages)
        if on_finished is not None:
            on_finished(part)
        changes += part.changes
    execution.progress("calibrating", work.done, len(plan.stages))
    return Calibration(tuple(changes), plan.left)


def _refuse_unmatched(model: PreTrainedModel, layers: Sequence[str]) -> None:
    """Raises `EvaluationError` for patterns that no module matches."""
    names = [name for name, module in model.named_modules() if name and module._parameters]
    unmatched = [each for each in layers if not any(fnmatchcase(name, each) for name in names)]
    raise_all(
        [f"no module with weights is called {each!r}{suggest(each, names)}" for each in unmatched],
        EvaluationError,
        "layers",
    )


@dataclass(frozen=True)
class _Bundle:
    """Maps that multiply the same inputs, whose outputs are solved for together, and what was gathered of them."""

    maps: tuple[AffineMap, ...]
    sums: Moments | ChannelMoments


@dataclass
class _Work:
    """One calibration: models, samples, and how many stages are done."""

    model: PreTrainedModel
    parents: Sequence[PreTrainedModel]
    items: Sequence[tuple[Batch, Tensor, tuple[float, ...]]]
    settings: Settings
    plan: Plan
    chains: Sequence[Sequence[str]]
    execution: Execution
    done: int = 0

    def __post_init__(self) -> None:
        self._merge = Replay(self.model, self.chains)
        self._others = [Replay(parent, self.chains) for parent in self.parents]

    def groups(self) -> Iterator[list[list[AffineMap]]]:
        """Stages that are not done, those whose targets are held together: of a block, where they fit.

        All processes have the same groups.
        """
        units = sum(batch.get("attention_mask", ids).numel() for batch, ids, _ in self.items)
        if self.execution.processes is not None:
            units = max(self.execution.processes.gather(units))
        group: list[list[AffineMap]] = []
        block: str | None = None
        for stage in self.plan.stages[self.done :]:
            of_stage = self.plan.block_of(stage)
            size = 4 * units * sum(site.size for maps in (*group, stage) for each in maps for site in each.sites)
            if group and (of_stage is None or of_stage != block or size > self.settings.memory):
                yield group
                group = []
            group.append(stage)
            block = of_stage
        if group:
            yield group

    def calibrated(self, stages: Sequence[Sequence[AffineMap]]) -> Finished:
        """Changes the maps of some stages."""
        changes: list[MapChange] = []
        targets: list[dict[str, Tensor]] = []
        for stage in stages:
            bundles, problem = self._bundles(stage), None
            try:
                targets = targets or [self._targets(number, stages) for number in range(len(self.items))]
                for number, of_item in enumerate(targets):
                    self._gather(number, bundles, of_item)
            except EvaluationError as error:
                problem = str(error)
            for bundle in self._over_processes(bundles, problem):
                changes += self._change(bundle)
            self.done += 1
        tensors = {
            f"{each.name}.{key}": value
            for each in changes
            for key, value in parameters_of(self.model, each.name).items()
        }
        return Finished(tuple(changes), tensors)

    @torch.no_grad()
    def take_over(self, part: Finished) -> None:
        """Gives the maps of the next stages what was found for them before."""
        parameters = dict(self.model.named_parameters())
        for name, value in part.tensors.items():
            parameters[name].copy_(value)
        names = {row.name for row in part.changes}
        self.done += sum(each.name in names for each, *_ in self.plan.stages)

    def _module(self, of_map: AffineMap) -> Any:
        return self.model.get_submodule(of_map.name)

    def _finished(self) -> set[str]:
        """The blocks that need not run again."""
        return self.plan.finished(self.done) & {block for chain in self.chains for block in chain}

    def _bundles(self, stage: Sequence[AffineMap]) -> list[_Bundle]:
        """Linear maps of one stage together, all others alone."""
        together: list[AffineMap] = []
        alone: list[AffineMap] = []
        for each in stage:
            single = each.is_norm or len(each.sites) > 1 or isinstance(self._module(each), CONVOLUTIONS)
            (alone if single else together).append(each)
        return [self._empty(tuple(maps)) for maps in (together, *([each] for each in alone)) if maps]

    def _empty(self, maps: tuple[AffineMap, ...]) -> _Bundle:
        shapes = [groups_of(self._module(each)) for each in maps]
        groups, inputs, _ = shapes[0]
        outputs = sum(shape[2] for shape in shapes)
        if self.settings.method == "repair":
            return _Bundle(maps, ChannelMoments.empty(groups * outputs, self.model.device))
        return _Bundle(maps, Moments.empty(groups, inputs, outputs, self.model.device))

    def _targets(self, number: int, stages: Sequence[Sequence[AffineMap]]) -> dict[str, Tensor]:
        """The blend of what the parents give, by the label of what is compared, (s, c)."""
        batch, ids, weights = self.items[number]
        compared = {
            site.answers.label: (site.answers, each) for stage in stages for each in stage for site in each.sites
        }
        layers = [layer for layer, _ in compared.values()]
        modules = [self._module(each) for _, each in compared.values()]
        mask = attention_mask(batch, ids, layers, self.model.device)
        blend: dict[str, Tensor] = {}
        for parent, (replay, weight) in enumerate(zip(self._others, weights, strict=True)):
            if weight == 0:
                continue

            def receive(index: int, tensor: Tensor, weight: float = weight, parent: int = parent) -> None:
                rows = outputs_of(modules[index], tensor, layers[index], len(ids), mask)
                check_rows(rows, layers[index].label, f"parent {parent + 1}")
                label = layers[index].label
                blend[label] = rows * weight if label not in blend else blend[label].add_(rows, alpha=weight)

            replay.run(number, batch, layers, receive, self._finished())
        return blend

    def _gather(self, number: int, bundles: Sequence[_Bundle], targets: Mapping[str, Tensor]) -> None:
        """Runs the merge on a batch, and adds what its maps read and give."""
        batch, ids, weights = self.items[number]
        sites = [site for bundle in bundles for each in bundle.maps for site in each.sites]
        layers = list(dict.fromkeys(layer for site in sites for layer in (site.reads, site.answers)))
        mask = attention_mask(batch, ids, layers, self.model.device)
        seen: dict[Layer, Tensor] = {}

        def receive(index: int, tensor: Tensor) -> None:
            seen[layers[index]] = tensor.clone() if layers[index].overwritten else tensor

        self._merge.run(number, batch, layers, receive, self._finished())
        for bundle in bundles:
            for of_call in zip(*(each.sites for each in bundle.maps), strict=True):
                answers = [
                    outputs_of(self._module(each), seen[site.answers], site.answers, len(ids), mask)
                    for each, site in zip(bundle.maps, of_call, strict=True)
                ]
                y_sc = torch.cat(answers, 1).double()
                t_sc = torch.cat([targets[site.answers.label] for site in of_call], 1).double()
                check_rows(y_sc, of_call[0].answers.label, "the merge")
                if isinstance(bundle.sums, ChannelMoments):
                    bundle.sums.add(y_sc, t_sc)
                    continue
                reads = of_call[0].reads
                x_sgi = inputs_of(self._module(bundle.maps[0]), seen[reads], reads, len(ids), mask)
                r_sc = t_sc - y_sc
                if self.settings.own < 1:
                    apart = [
                        outputs_of(
                            self._module(each), self._apart(each, seen[reads], weights), site.answers, len(ids), mask
                        )
                        for each, site in zip(bundle.maps, of_call, strict=True)
                    ]
                    r_sc = torch.lerp(torch.cat(apart, 1).double(), r_sc, self.settings.own)
                groups = (x_sgi.shape[1], -1)
                bundle.sums.add(x_sgi, r_sc.unflatten(1, groups), t_sc.unflatten(1, groups))

    @torch.no_grad()
    def _apart(self, of_map: AffineMap, features: Tensor, weights: Sequence[float]) -> Tensor:
        """What the blend of the parents' maps makes of the merge's input, less what its own map makes of it."""
        total = -self._module(of_map)(features)
        for parent, weight in zip(self.parents, weights, strict=True):
            if weight:
                total.add_(parent.get_submodule(of_map.name)(features), alpha=weight)
        return total

    def _over_processes(self, bundles: Sequence[_Bundle], problem: str | None) -> Sequence[_Bundle]:
        """The sums over the samples of all processes; raises what went wrong on any of them."""
        processes = self.execution.processes
        own = [bundle.sums for bundle in bundles]
        gathered = [(own, problem)]
        if processes is not None:
            gathered = processes.gather(([sums.cpu() for sums in own], problem))
        problems = dict.fromkeys(each for _, each in gathered if each is not None)
        raise_all(list(problems), EvaluationError, "the merge cannot be calibrated")
        first, *others = (sums for sums, _ in gathered)
        for part in others:
            for sums, other in zip(first, part, strict=True):
                sums.merge(other)  # type: ignore[arg-type]  # those of one bundle are of one kind
        device = self.model.device
        return [_Bundle(bundle.maps, sums.to(device)) for bundle, sums in zip(bundles, first, strict=True)]

    def _change(self, bundle: _Bundle) -> Iterator[MapChange]:
        """Changes the weights of maps by what was gathered."""
        start = 0
        for each in bundle.maps:
            module = self._module(each)
            before = parameters_of(self.model, each.name)
            groups, inputs, outputs = groups_of(module)
            has_bias = module._parameters.get("bias") is not None
            if isinstance(bundle.sums, ChannelMoments):
                stop = start + groups * outputs
                scaling = bundle.sums.of_channels(start, stop).scaling(bias=has_bias)
                scale(module, scaling.factor_c, scaling.shift_c)
                errors = scaling.before, scaling.after
            else:
                stop = start + outputs
                correction = bundle.sums.of_outputs(start, stop).correction(self.settings.ridge, bias=has_bias)
                change(module, correction.weight_goi, correction.bias_go)
                errors = correction.before, correction.after
            start = stop
            apart = _mean_distance([parameters_of(parent, each.name) for parent in self.parents])
            moved = _distance(before, parameters_of(self.model, each.name))
            yield MapChange(each.name, int(bundle.sums.count), inputs, moved, apart, *errors)


def check_rows(rows_sc: Tensor, label: str, model: str) -> None:
    """Raises `EvaluationError` where a feature is not finite."""
    if not bool(rows_sc.isfinite().all()):
        raise EvaluationError(
            f"features of layer {label!r} of {model} are not finite (NaN or Inf); leave the sample out, or look for "
            "overflow in a wider dtype"
        )


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((other[name].double() - value.double()).square().sum()) for name, value in one.items()) ** 0.5


def _mean_distance(of_parents: Sequence[Mapping[str, Tensor]]) -> float:
    pairs = [_distance(one, other) for one, other in combinations(of_parents, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0
