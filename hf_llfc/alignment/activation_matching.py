"""Activation matching (Li et al. 2015; Ainsworth et al., ICLR 2023; Jordan et al., *REPAIR*, ICLR 2023).

Units are matched by the correlation of their activations on calibration data. Where a unit's activation can be seen
follows from the spec: a linear map whose weight is declared `[out, into]` reads `into` at its input. Every input that
carries an axis adds its correlations, once however many maps read it; axes that no input carries are seen where a
linear map writes them. So heads and their value channels are seen where the output projection reads them, query and key
channels where their projections write them.

Statistics are streamed: per site and batch the sums, squares and cross-products are added up in float64, and no
activation outlives its batch. Shape suffixes: n samples (positions where the mask is one), i and j an entry of the
matched axes in A and B, c the other channels of the site (`head_dim` under a rotary embedding, say), matched index by
index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_llfc.alignment.assignment.assignment import assign
from hf_llfc.alignment.gains import ROLES
from hf_llfc.alignment.groups import Group, groups_of, signs_of, solve_group, solve_signed
from hf_llfc.errors import AlignmentError
from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.expressions import AxisUse, Concatenation, Expression, Fixed, axis_uses
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS
from hf_llfc.symmetry.orthogonal import Orthogonal
from hf_llfc.symmetry.spec import Alignment, PermutationSpec
from hf_llfc.symmetry.transforms import Permutation, Transform
from hf_llfc.symmetry.views import pieces

# A unit whose variance is a smaller part of its mean square than this does not vary: float64 rounding is all there is.
DEAD = 1e-12


@dataclass(frozen=True)
class Site:
    """A tensor of activations: the input or output of one module.

    Attributes:
        module: Name of the linear map.
        at_input: Whether its input is looked at, else its output.
        channels: The axis expression of the channels.
        channel_dim: Where the channels lie in the activation: −1, or 1 for convolutions.
        transposed: Whether the weight of the map is `[into, out]`.
    """

    module: str
    at_input: bool
    channels: Expression
    channel_dim: int
    transposed: bool = False


@dataclass(frozen=True)
class Sight:
    """A group as a site shows it; `axes` are those of its axes that can be seen there."""

    group: Group
    axes: frozenset[str]


@dataclass
class _Moments:
    """Streamed first and second moments of matched axes at one site; everything else contracted or kept aligned."""

    count: int = 0
    a_sum: Tensor | float = 0.0
    b_sum: Tensor | float = 0.0
    a_square: Tensor | float = 0.0
    b_square: Tensor | float = 0.0
    cross: Tensor | float = 0.0

    def update(self, a_nic: Tensor, b_njc: Tensor) -> None:
        """Adds a batch; `a_nic` and `b_njc` are `[samples, entries, other channels]`."""
        self.count += a_nic.shape[0]
        self.a_sum = self.a_sum + a_nic.sum(0)
        self.b_sum = self.b_sum + b_njc.sum(0)
        self.a_square = self.a_square + a_nic.square().sum(0)
        self.b_square = self.b_square + b_njc.square().sum(0)
        self.cross = self.cross + torch.einsum("nic,njc->cij", a_nic, b_njc)

    def correlation(self) -> Tensor:
        """Pearson correlation summed over the other channels, `[entries of A, entries of B]`; dead units count zero."""
        a_mean, a_scale = self._mean_and_inverse_std(self.a_sum, self.a_square)
        b_mean, b_scale = self._mean_and_inverse_std(self.b_sum, self.b_square)
        covariance = self.cross / self.count - torch.einsum("ic,jc->cij", a_mean, b_mean)
        return torch.einsum("cij,ic,jc->ij", covariance, a_scale, b_scale)

    def cosine(self) -> Tensor:
        """Uncentred cross-moments `[entries of A, entries of B]`, scaled to a mean square of 1 in either model.

        For what is transformed by matrices: single units have no meaning there, and their norms must not be changed.
        """
        cross = torch.as_tensor(self.cross).sum(0)
        sizes = [float(torch.as_tensor(squares).sum()) for squares in (self.a_square, self.b_square)]
        scale = (sizes[0] * sizes[1]) ** 0.5
        return cross * (len(cross) / scale if scale > 0 else 0.0)

    def _mean_and_inverse_std(self, total: Tensor | float, squares: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and 1/std of each unit; a unit whose variance is float noise is dead, and its 1/std counts as zero."""
        mean, square = torch.as_tensor(total / self.count), torch.as_tensor(squares / self.count)
        variance = square - mean.square()
        alive = variance > DEAD * square
        return mean, torch.where(alive, variance, 1).rsqrt() * alive


# (site, number of the piece of its channels, children of the group that the piece holds) → moments.
_GroupMoments = dict[tuple[Site, int, tuple[str, ...]], _Moments]

# Children of a group that are seen together → correlations [entries of A, entries of B] of root and children.
Correlations = Mapping[tuple[str, ...], Tensor]


@dataclass(frozen=True)
class Observed:
    """Moments that calibration data showed of some models.

    Attributes:
        groups: The groups of the axes, in the order of the spec.
        samples: Number of samples.
        moments: Pair of models, by their indices → axis of a group → what was gathered.
    """

    groups: Sequence[Group]
    samples: int
    moments: Mapping[tuple[int, int], Mapping[str, _GroupMoments]]

    def correlations(self, group: Group, pair: tuple[int, int] = (0, 1)) -> Correlations | None:
        """The correlations of a group, summed over all sites that show it; None where no site shows all of it."""
        moments = self.moments[pair].get(group.axis, {})
        if not moments or not {child for _, _, children in moments for child in children}.issuperset(group.children):
            return None
        total: dict[tuple[str, ...], Tensor] = {}
        for (_, _, children), moment in moments.items():
            correlation = (moment.cosine() if group.matrices else moment.correlation()).cpu()
            total[children] = total[children] + correlation if children in total else correlation
        return total


def match_activations(
    reference: nn.Module,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    spec: PermutationSpec,
) -> Alignment:
    """Finds transforms of `model` by the correlation of its activations with those of `reference`.

    Args:
        reference: The loaded model that stays, A, in evaluation mode.
        model: The loaded model that moves, B, of the same architecture and in evaluation mode.
        batches: Calibration data: keyword arguments of the models. Positions where `attention_mask` is zero never
            count.
        spec: The permutation spec both follow.

    Returns:
        The alignment. Axes whose activations no linear map shows (experts fused into one tensor, say) stay where
        they are and are named in the metadata under `unmatched`.

    Raises:
        AlignmentError: There is no calibration data, no axis can be seen, the models differ in shape or are in
            training mode, or an activation is not finite.
    """
    observed = observe([reference, model], batches, spec, ROLES)
    transforms: dict[str, Transform] = dict(spec.identity_alignment().transforms)
    before = after = 0.0
    unmatched: list[str] = []
    for group in observed.groups:
        correlations = observed.correlations(group)
        if correlations is None:
            unmatched += group.matched
            continue
        best, value_before, value_after = solve(group, correlations, {axis: transforms[axis] for axis in group.matched})
        transforms.update(best)
        before, after = before + value_before, after + value_after
    return Alignment(
        spec,
        transforms,
        {
            "method": "activation_matching",
            "objective_before": before,
            "objective_after": after,
            "unmatched": unmatched,
            "samples": observed.samples,
        },
    )


def observe(
    models: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    spec: PermutationSpec,
    labels: Sequence[str],
) -> Observed:
    """Runs models on calibration data, and gathers the moments of all their pairs.

    Args:
        models: Two or more loaded models, as for `match_activations`.
        batches: Calibration data, as for `match_activations`.
        spec: The permutation spec of all models.
        labels: Names of the models in error messages.

    Raises:
        AlignmentError: As `match_activations` raises it.
    """
    if any(model.training for model in models):
        every = "both models" if len(models) == 2 else "all models"
        raise AlignmentError(f"activation matching needs {every} in evaluation mode: call `.eval()` first")
    binding, *others = (
        spec.bind({name: tensor.shape for name, tensor in model.state_dict().items()}) for model in models
    )
    if any(other.sizes != binding.sizes or other.tensors.keys() != binding.tensors.keys() for other in others):
        count = "two" if len(models) == 2 else len(models)
        raise AlignmentError(f"activation matching needs {count} models of one architecture; their tensors differ")
    groups = groups_of(binding)
    sights = _sights(models[0], binding, groups)
    if not sights:
        raise AlignmentError("no symmetric axis can be seen at a linear map or convolution; use weight matching")
    pairs = list(combinations(range(len(models)), 2))
    moments: dict[tuple[int, int], dict[str, _GroupMoments]] = {pair: {} for pair in pairs}
    for batch in batches:
        mask = batch.get("attention_mask")
        seen = []
        for model in models:
            with torch.no_grad(), captured(model, sights) as of_model:
                model(**batch)
            seen.append(of_model)
        looked_at: set[tuple[int | Expression, ...]] = set()
        for site, seen_here in sights.items():
            if any(site not in of_model for of_model in seen):
                continue  # a head or an attention that this kind of input does not reach
            activations = (*(id(of_model[site]) for of_model in seen), site.channels)
            if activations in looked_at:
                continue  # queries, keys and values read one and the same tensor
            looked_at.add(activations)
            flat = [samples(of_model[site], site, mask, label) for of_model, label in zip(seen, labels, strict=True)]
            for sight in seen_here:
                for i, j in pairs:
                    of_group = moments[i, j].setdefault(sight.group.axis, {})
                    _update(of_group, site, sight, flat[i], flat[j], binding.sizes)
    counts = [
        moment.count for of_pair in moments.values() for of_group in of_pair.values() for moment in of_group.values()
    ]
    if not counts:
        raise AlignmentError("activation matching needs calibration data, and there was not a single batch")
    return Observed(groups, max(counts), moments)


def _sights(model: nn.Module, binding: Binding, groups: list[Group]) -> dict[Site, list[Sight]]:
    """Sites, and the groups that each shows: each axis of a group at inputs if there are any, else at outputs.

    A group is left out unless all its axes can be seen.
    """
    inputs, outputs = _sites(model, binding)
    sights: dict[Site, list[Sight]] = {}
    for group in groups:
        axes_at: dict[Site, list[str]] = {}
        seen: set[str] = set()
        for axis in (group.axis, *group.children):
            at_inputs, at_outputs = (
                [site for site in candidates if _carries(site.channels, group.axis, axis)]
                for candidates in (inputs, outputs)
            )
            for site in at_inputs or at_outputs:
                axes_at.setdefault(site, []).append(axis)
                seen.add(axis)
        if seen == group.axes:
            for site, axes in axes_at.items():
                sights.setdefault(site, []).append(Sight(group, frozenset(axes)))
    return sights


def input_sites(model: nn.Module, binding: Binding) -> list[Site]:
    """The inputs of all linear maps and convolutions."""
    return _sites(model, binding)[0]


def _sites(model: nn.Module, binding: Binding) -> tuple[list[Site], list[Site]]:
    """Inputs and outputs of all linear maps and convolutions."""
    inputs: list[Site] = []
    outputs: list[Site] = []
    for name, module in model.named_modules():
        bound = binding.tensors.get(f"{name}.weight")
        if bound is None or len(bound.spec.dimensions) < 2 or isinstance(module, nn.Embedding):
            continue
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        transposed = isinstance(module, Conv1D)
        if not (convolution or transposed or isinstance(module, nn.Linear)):
            continue
        out, into = bound.spec.dimensions[:2] if not transposed else bound.spec.dimensions[1::-1]
        inputs.append(Site(name, True, into, 1 if convolution else -1, transposed))
        outputs.append(Site(name, False, out, 1 if convolution else -1, transposed))
    return inputs, outputs


def _carries(channels: Expression, *axes: str) -> bool:
    """Whether a part of the channels holds all of the axes."""
    if isinstance(channels, Concatenation):
        return any(_carries(part, *axes) for part in channels.parts)
    names = {use.axis for use in axis_uses(channels)}
    return names.issuperset(axes)


@contextmanager
def captured(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Collects the activations of one forward pass."""
    captured: dict[Site, Tensor] = {}
    modules = dict(model.named_modules())

    def hook_for(site: Site) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            captured[site] = arguments[0] if site.at_input else output

        return hook

    handles = [modules[site.module].register_forward_hook(hook_for(site)) for site in sites]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def samples(activation: Tensor, site: Site, mask: Tensor | None, role: str) -> Tensor:
    """The activation as `[samples, channels]` in float64, masked positions left out.

    Activations of every position are `[rows, positions, channels]`, or flattened to `[rows · positions, channels]`;
    those of whole rows (a pooled output) have no position to leave out.
    """
    features = activation.movedim(site.channel_dim, -1)
    if mask is not None:
        if mask.ndim != 2:
            raise AlignmentError(f"attention_mask: shape [rows, positions] expected, {list(mask.shape)} found")
        if features.ndim == 3 and features.shape[:2] == mask.shape:
            features = features[mask.bool()]
        elif features.ndim == 2 and features.shape[0] == mask.numel() != mask.shape[0]:
            features = features[mask.flatten().bool()]
    features = features.reshape(-1, features.shape[-1]).double()
    if not bool(torch.isfinite(features).all()):
        side = "input" if site.at_input else "output"
        raise AlignmentError(f"activation matching: NaN or Inf in the {side} of {site.module} of {role}")
    return features


def _update(
    moments: _GroupMoments,
    site: Site,
    sight: Sight,
    a_flat: Tensor,
    b_flat: Tensor,
    sizes: Mapping[str, int],
) -> None:
    group = sight.group
    a_pieces = _channel_pieces(a_flat, site.channels, sizes)
    b_pieces = _channel_pieces(b_flat, site.channels, sizes)
    for number, ((a_piece, atoms), (b_piece, _)) in enumerate(zip(a_pieces, b_pieces, strict=True)):
        dim_of = {atom.axis: dim for dim, atom in enumerate(atoms) if isinstance(atom, AxisUse)}
        if group.axis not in dim_of or sight.axes.isdisjoint(dim_of):
            continue
        children = tuple(child for child in group.children if child in dim_of)
        dims = [dim_of[axis] for axis in (group.axis, *children)]
        a_nic, b_njc = (_entries_first(piece, dims) for piece in (a_piece, b_piece))
        moments.setdefault((site, number, children), _Moments()).update(a_nic, b_njc)


def _channel_pieces(
    flat: Tensor, channels: Expression, sizes: Mapping[str, int]
) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """Pieces of the channels of `[samples, channels]`, samples last."""
    yield from ((piece, atoms[:-1]) for piece, atoms in pieces(flat.T, (channels, Fixed(flat.shape[0])), sizes))


def _entries_first(piece: Tensor, dims: list[int]) -> Tensor:
    """`[channel atoms …, samples]` as `[samples, entries of the group's axes, other channels]`."""
    others = [dim for dim in range(piece.ndim - 1) if dim not in dims]
    ordered = piece.permute(piece.ndim - 1, *dims, *others)
    entries = ordered.shape[1 : 1 + len(dims)].numel()
    return ordered.reshape(ordered.shape[0], entries, -1)


def solve(
    group: Group, correlations: Correlations, present: Mapping[str, Transform]
) -> tuple[Mapping[str, Transform], float, float]:
    """The best transforms of a group, with the correlation summed over its units before and after."""
    entries = range(group.size)
    if not group.children:
        (gain_ij,) = correlations.values()
        if group.axis in group.matrices:
            matrix = MATRIX_GROUPS[group.matrices[group.axis]].nearest(gain_ij)
            return {group.axis: Orthogonal(matrix)}, float(gain_ij.trace()), float((gain_ij * matrix).sum())
        perm = assign(gain_ij)
        return {group.axis: Permutation(perm)}, float(gain_ij.trace()), float(gain_ij[entries, perm].sum())
    gain_iajb = {
        children: correlation.unflatten(1, (group.size, -1)).unflatten(0, (group.size, -1))
        for children, correlation in correlations.items()
    }
    if signs_of(group) is not None:
        of_children = {len(children): gain[:, 0, :, 0] for children, gain in gain_iajb.items()}
        solution = solve_signed(group, of_children.get(0), of_children.get(1), present)
        return solution.transforms if solution.gain else present, solution.value, solution.value + solution.gain
    solution = solve_group(
        group,
        (
            (i, j, {children: gain[i, :, j] for children, gain in gain_iajb.items()})
            for i, j in (product(entries, entries) if group.moves else zip(entries, entries, strict=True))
        ),
        present,
    )
    return solution.transforms if solution.gain else present, solution.value, solution.value + solution.gain
