"""The canonical form of a checkpoint: what is left of its symmetries afterwards is orthogonal.

Transforms of a model by more than permutations are mostly not orthogonal: norms have gains, and where two linear maps
meet every invertible matrix between them will do. Both are taken away beforehand, in the checkpoint itself, which
stays one of the same class and computes the same function:

1. **Norms are folded.** With gain g and shift b, W·(g ⊙ n + b) = (W·diag g)·n + W·b. The gain goes into the maps that
   read the norm, the shift into their biases; gain 1 and shift 0 are left behind. Where a reader has no bias the shift
   stays, as b / g in front of W·diag g. A tied output head gets a tensor of its own, since the gain goes into it.
2. **The stream is centred** where it is read through LayerNorm only, which takes the mean away: what writes to it and
   what reads it lose theirs, without effect.
3. **Biases that attention hides are taken away.** Its weights sum to 1, so that a bias b of the values adds W·b to what
   the output map W gives, whatever the input: it goes into the bias of that map. A bias of the keys adds the same to
   all scores of a query, which the softmax takes away again: it goes, unless a rotary embedding or a norm stands
   between.
4. **Circuits are balanced.** Where L writes and R reads the same channels and nothing but linear maps lies between,
   (M·L, M⁻ᵀ·R) is the same function for every M of a group G. Among all of these ‖L‖² + ‖R‖² has a minimum that is
   unique up to the orthogonal matrices in G (Kempf and Ness, *The length of vectors in representation spaces*, 1979).
   So two models that differ by an element of G differ, once balanced, by an orthogonal one. The minima, with Gram
   matrices A = L·Lᵀ and B = R·Rᵀ:

   - every invertible M (values and outputs; queries and keys without a rotary embedding): M·A·Mᵀ = M⁻ᵀ·B·M⁻¹, which
     the square root of A^-½ (A^½ B A^½)^½ A^-½ solves, the geometric mean of A⁻¹ and B;
   - one number per unit (neurons of ReLU, and gated ones in what the gate multiplies) or per pair of channels that a
     rotary embedding turns: its square is the ratio of the norms of R and L.

   Where circuits share tensors (a linear map between two layers of ReLU is on the right of one and on the left of the
   other) the sum of all squares is what has the minimum. In the logarithms of the numbers it is convex, and balancing
   one circuit after another leads there (Stock et al., *Equi-normalization of neural networks*, ICLR 2019).

A folded tensor is made from a few others when it is read, in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from hf_llfc.errors import SpecError
from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.expressions import Atom, AxisUse, Expression
from hf_llfc.symmetry.orthogonal import multiply_along
from hf_llfc.symmetry.spec import PermutationSpec
from hf_llfc.symmetry.views import map_pieces, pieces

INVERTIBLE = "invertible"
SCALES = "scales"
PAIR_SCALES = "pair_scales"

# Eigenvalues of a Gram matrix below this part of the largest count as so large: heads that do nothing stay harmless.
SMALLEST = 1e-10

# Circuits that share tensors are balanced in turns, until no number changes by more, or so many times.
SETTLED = 1e-12
TURNS = 10_000

# A gain below this part of the largest of its norm cannot be divided by.
SMALLEST_GAIN = 1e-6


@dataclass(frozen=True)
class Norm:
    """A norm without a say in the residual stream: it is read by linear maps only.

    Attributes:
        gain: The declared name of its gain.
        shift: Of its shift, None for RMSNorm.
        readers: Of the weights of all linear maps that read it; those that a checkpoint lacks do not count.
        neutral: The stored value of a gain of 1: 0 where the class adds 1 to what is stored.
    """

    gain: str
    shift: str | None
    readers: tuple[str, ...]
    neutral: float = 1.0


@dataclass(frozen=True)
class Part:
    """A piece of a tensor, counted as `hf_llfc.symmetry.views.pieces` yields them: of one fused projection, say."""

    tensor: str
    piece: int = 0


@dataclass(frozen=True)
class Circuit:
    """Linear maps that meet in the channels of one axis.

    Attributes:
        axis: The axis between them.
        kind: `invertible`, `scales` or `pair_scales`: which M the circuit allows.
        left: What is multiplied by M.
        right: What is multiplied by M⁻ᵀ.
    """

    axis: str
    kind: str
    left: tuple[Part, ...]
    right: tuple[Part, ...]


@dataclass(frozen=True)
class HiddenBiases:
    """Biases that an attention hides, see the module; tensors that a checkpoint lacks do not count.

    Attributes:
        keys: The bias of the keys; None where it is not hidden.
        values: The bias of the values.
        weight: The declared name of the weight of the output map.
        bias: Of its bias. Without it the bias of the values stays.
    """

    keys: Part | None
    values: Part
    weight: str
    bias: str


@dataclass(frozen=True)
class CanonicalForm:
    """The rules by which checkpoints of one architecture are brought into canonical form.

    Attributes:
        spec: The permutation spec of what comes out, with the groups that its axes have then.
        norms: The norms that are folded; none where the residual stream has to stay as it is.
        writers: Declared names of what writes to the residual stream, and of nothing else.
        hidden: Biases that are taken away.
        circuits: What is balanced.
        centred: Whether the stream is read through LayerNorm only.
        tied: (output head, embedding): the head is a copy of the embedding where a checkpoint has no tensor for it.
    """

    spec: PermutationSpec
    norms: tuple[Norm, ...] = ()
    writers: frozenset[str] = frozenset()
    hidden: tuple[HiddenBiases, ...] = ()
    circuits: tuple[Circuit, ...] = ()
    centred: bool = False
    tied: tuple[str, str] | None = None


@dataclass(frozen=True)
class Canonical:
    """One checkpoint in canonical form.

    Args:
        form: How.
        binding: Its tensors, by its own names, bound to a spec of the same tensors.
        read: Gives one of its tensors by its own name.

    Raises:
        SpecError: A tensor of the residual stream has no part in the form.
    """

    form: CanonicalForm
    binding: Binding
    read: Callable[[str], Tensor]
    stream: str = "residual"
    _matrices: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _making: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.form.norms:
            return
        known = self.form.writers | self._readers.keys() | self._norms.keys()
        known |= {self._bias_of(reader) for reader in self._readers}
        unknown = [
            name
            for name, bound in self.binding.tensors.items()
            if self._is_of_stream(bound.spec.name) and bound.spec.name not in known
        ]
        if unknown:
            raise SpecError(
                f"{', '.join(unknown[:3])}: what this does with the residual stream is not known, so its norms "
                "cannot be folded; align with the groups `permutation`"
            )

    @property
    def added(self) -> dict[str, str]:
        """Tensors that the checkpoint does not hold by itself → what they are copies of, both by their own names."""
        if self.form.tied is None:
            return {}
        head, table = self.form.tied
        present = {bound.spec.name for bound in self.binding.tensors.values()}
        return {head: self._own_name(table)} if head not in present else {}

    @cached_property
    def _present(self) -> dict[str, str]:
        """Declared name → own name, also of what is added."""
        own = {bound.spec.name: name for name, bound in self.binding.tensors.items()}
        return own | {name: name for name in self.added}

    @cached_property
    def _norms(self) -> dict[str, Norm]:
        """Gain or shift → its norm."""
        return {name: norm for norm in self.form.norms for name in (norm.gain, norm.shift) if name is not None}

    @cached_property
    def _readers(self) -> dict[str, Norm]:
        """Weight of a reader → the norm that it reads."""
        return {reader: norm for norm in self.form.norms for reader in norm.readers}

    @cached_property
    def _circuits(self) -> dict[str, list[tuple[int, Circuit, bool]]]:
        """Tensor → (piece, circuit, whether on its left)."""
        by_tensor: dict[str, list[tuple[int, Circuit, bool]]] = {}
        for circuit in self.form.circuits:
            for parts, is_left in ((circuit.left, True), (circuit.right, False)):
                for part in parts:
                    by_tensor.setdefault(part.tensor, []).append((part.piece, circuit, is_left))
        return by_tensor

    @cached_property
    def _taken(self) -> dict[str, set[int]]:
        """Bias → its pieces that are taken away."""
        by_tensor: dict[str, set[int]] = {}
        for hidden in self.form.hidden:
            moved = hidden.values if hidden.bias in self._present else None
            for part in (hidden.keys, moved):
                if part is not None:
                    by_tensor.setdefault(part.tensor, set()).add(part.piece)
        return by_tensor

    @cached_property
    def _given(self) -> dict[str, HiddenBiases]:
        """Bias of an output map → what it takes up."""
        return {
            hidden.bias: hidden
            for hidden in self.form.hidden
            if hidden.bias in self._present and hidden.values.tensor in self._present
        }

    def is_changed(self, name: str) -> bool:
        """Whether a tensor may differ from what the checkpoint holds, given the checkpoint's own name."""
        if name in self.added:
            return True
        declared = self.binding.tensors[name].spec.name
        of_norm = bool(self.form.norms) and (declared in self._norms or self._is_of_stream(declared))
        biases = {self._bias_of(reader) for reader in self._readers} | self._taken.keys() | self._given.keys()
        return of_norm or declared in self._circuits or declared in biases

    def canonical(self, name: str) -> Tensor:
        """Computes one tensor in canonical form, by the checkpoint's own name, float64; others come as they are."""
        if not self.is_changed(name):
            return self.read(name)
        declared = name if name in self.added else self.binding.tensors[name].spec.name
        tensor = self._folded(declared)
        involved = self._circuits.get(declared, [])
        if not involved:
            return tensor
        number = count()

        def balanced(piece: Tensor, atoms: tuple[Atom, ...]) -> Tensor:
            index = next(number)
            for of_piece, circuit, is_left in involved:
                if of_piece == index:
                    piece = _multiplied(piece, atoms, circuit, is_left, self._matrix(circuit))
            return piece

        return map_pieces(tensor, self._dimensions(declared), self._sizes, balanced)

    @property
    def _sizes(self) -> Mapping[str, int]:
        return {**self.binding.sizes, **{name: axis.size for name, axis in self.form.spec.axes.items() if axis.size}}

    def _dimensions(self, declared: str) -> tuple[Expression, ...]:
        return self.form.spec.tensors[declared].dimensions

    def _own_name(self, declared: str) -> str:
        return self.binding.name_of(self.binding.spec.tensors[declared], ())

    def _is_of_stream(self, declared: str) -> bool:
        return any(use.axis == self.stream for use in self.binding.spec.tensors[declared].axes)

    def _stream_dims(self, declared: str) -> list[int]:
        dimensions = self.binding.spec.tensors[declared].dimensions
        return [
            index
            for index, dimension in enumerate(dimensions)
            if isinstance(dimension, AxisUse) and dimension.axis == self.stream
        ]

    def _source(self, declared: str) -> Tensor:
        """A tensor as the checkpoint holds it, in float64."""
        own = self._present[declared]
        return self.read(self.added.get(own, own)).double()

    @staticmethod
    def _bias_of(weight: str) -> str:
        return weight.removesuffix("weight") + "bias"

    def _shift_goes_to_biases(self, norm: Norm) -> bool:
        return all(self._bias_of(reader) in self._present for reader in norm.readers if reader in self._present)

    def _folded(self, declared: str) -> Tensor:
        """A tensor with norms and hidden biases folded and the stream centred."""
        tensor = self._norms_folded(declared)
        if declared in self._given:
            tensor = tensor + self._output_of_values(self._given[declared])
        if declared not in self._taken:
            return tensor
        number = count()

        def left(piece: Tensor, atoms: tuple[Atom, ...]) -> Tensor:
            return torch.zeros_like(piece) if next(number) in self._taken[declared] else piece

        return map_pieces(tensor, self._dimensions(declared), self._sizes, left)

    def _output_of_values(self, hidden: HiddenBiases) -> Tensor:
        """Applies the output map to the bias of the values."""
        of_bias = list(self._pieces(hidden.values.tensor))
        bias, of_values = of_bias[hidden.values.piece]
        ((weight, atoms),) = self._pieces(hidden.weight)
        letters = {atom: chr(ord("a") + index) for index, atom in enumerate(atoms)}
        stream = next(atom for atom in atoms if isinstance(atom, AxisUse) and atom.axis == self.stream)
        left, right = ("".join(letters[atom] for atom in these) for these in (atoms, of_values))
        return torch.einsum(f"{left},{right}->{letters[stream]}", weight, bias)

    def _pieces(self, declared: str) -> Iterator[tuple[Tensor, tuple[Atom, ...]]]:
        """Reads a tensor with its norms folded."""
        return pieces(self._norms_folded(declared), self._dimensions(declared), self._sizes)

    def _norms_folded(self, declared: str) -> Tensor:
        """A tensor after its norms are folded and the stream is centred."""
        if declared in self._norms:
            return self._left_behind(declared, self._norms[declared])
        tensor = self._source(declared)
        if not self.form.norms:
            return tensor
        weight = declared.removesuffix("bias") + "weight"
        if declared.endswith("bias") and weight in self._readers:
            norm = self._readers[weight]
            if norm.shift is not None and norm.shift in self._present and self._shift_goes_to_biases(norm):
                (dim,) = self._stream_dims(weight)
                shift = torch.tensordot(self._source(weight), self._source(norm.shift), ([dim], [0]))
                tensor = tensor + shift.reshape(tensor.shape)  # of a convolution over single pixels, too
        dims = self._stream_dims(declared)
        if declared in self._readers:
            norm = self._readers[declared]
            gain = self._gain(norm)
            for dim in dims:
                tensor = tensor * gain.reshape([-1 if index == dim else 1 for index in range(tensor.ndim)])
            # A shift that stays has a mean, which its readers must see.
            if norm.shift in self._present and not self._shift_goes_to_biases(norm):
                return tensor
        if self.form.centred:
            for dim in dims:
                tensor = tensor - tensor.mean(dim, keepdim=True)
        return tensor

    def _gain(self, norm: Norm) -> Tensor:
        return self._source(norm.gain) + (1 - norm.neutral)

    def _left_behind(self, declared: str, norm: Norm) -> Tensor:
        """The weight of a norm after it is folded."""
        stored = self._source(declared)
        if declared == norm.gain:
            return torch.full_like(stored, norm.neutral)
        if self._shift_goes_to_biases(norm):
            return torch.zeros_like(stored)
        gain = self._gain(norm)
        if bool((gain.abs() < SMALLEST_GAIN * gain.abs().max()).any()) and bool(stored.any()):
            raise SpecError(
                f"{self._present[norm.gain]}: a gain of almost 0 beside a shift that no bias can take up, so this norm "
                "cannot be folded; align with the groups `permutation`"
            )
        return stored / gain

    def _matrix(self, circuit: Circuit) -> Tensor:
        """The M that balances a circuit: `[.., n, n]`, or its diagonal `[.., n]`, with the parent in front if any."""
        with self._making:
            if circuit.axis not in self._matrices:
                together = self._sharing(circuit)
                parts = {part: self._piece(part) for other in together for part in (*other.left, *other.right)}
                self._matrices.update(
                    _balanced(together, {part: tensor for part, tensor in parts.items() if tensor is not None})
                )
            return self._matrices[circuit.axis]

    def _sharing(self, circuit: Circuit) -> list[Circuit]:
        """Collects the circuits that share pieces with a circuit, directly or through others, itself among them."""
        joined = [circuit]
        for member in joined:
            parts = {*member.left, *member.right}
            joined += [
                other for other in self.form.circuits if other not in joined and parts & {*other.left, *other.right}
            ]
        return joined

    def _piece(self, part: Part) -> _Piece | None:
        """A piece of a tensor before it is balanced; None where a checkpoint lacks it."""
        if part.tensor not in self._present:
            return None
        views = list(pieces(self._folded(part.tensor), self._dimensions(part.tensor), self._sizes))
        return views[part.piece]


_Piece = tuple[Tensor, tuple[Atom, ...]]


def _balanced(circuits: list[Circuit], parts: dict[Part, _Piece]) -> dict[str, Tensor]:
    """The matrices of circuits that share pieces, which are changed in `parts`; see the module."""
    assert len(circuits) == 1 or all(circuit.kind == SCALES for circuit in circuits)
    matrices: dict[str, Tensor] = {}
    for _ in range(TURNS):
        change = 0.0
        for circuit in circuits:
            left, right = (
                _rows([parts[part] for part in side if part in parts], circuit.axis) for side in _sides(circuit)
            )
            matrix = _balance(left, right, circuit.kind)
            if len(circuits) == 1:
                return {circuit.axis: matrix}
            matrices[circuit.axis] = matrices[circuit.axis] * matrix if circuit.axis in matrices else matrix
            change = max(change, float(matrix.log().abs().max()))
            for side, is_left in zip(_sides(circuit), (True, False), strict=True):
                for part in side:
                    if part in parts:
                        piece, atoms = parts[part]
                        parts[part] = _multiplied(piece, atoms, circuit, is_left, matrix), atoms
        if change <= SETTLED:
            break
    return matrices


def _sides(circuit: Circuit) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    return circuit.left, circuit.right


def _multiplied(piece: Tensor, atoms: tuple[Atom, ...], circuit: Circuit, is_left: bool, matrix: Tensor) -> Tensor:
    """A piece multiplied by the M of a circuit, or by its M⁻ᵀ."""
    dim, parent_dim = _places(atoms, circuit.axis)
    if circuit.kind != INVERTIBLE:
        shape = [1] * piece.ndim
        shape[dim] = piece.shape[dim]
        if parent_dim is not None:
            shape[parent_dim] = piece.shape[parent_dim]
            matrix = matrix if parent_dim < dim else matrix.T
        return piece * matrix.reshape(shape) if is_left else piece / matrix.reshape(shape)
    if not is_left:
        matrix = torch.linalg.inv(matrix).mT
    return multiply_along(piece, matrix, dim, parent_dim)


def _rows(parts: list[_Piece], axis: str) -> Tensor:
    """Pieces as rows of one axis, with its parent in front if it has one, side by side."""
    rows = []
    for piece, atoms in parts:
        dim, parent_dim = _places(atoms, axis)
        front = [dim] if parent_dim is None else [parent_dim, dim]
        piece = piece.movedim(front, list(range(len(front))))
        rows.append(piece.reshape(*piece.shape[: len(front)], -1))
    return torch.cat(rows, -1)


def _places(atoms: tuple[Atom, ...], axis: str) -> tuple[int, int | None]:
    """Finds the dimensions of an axis and of its parent in a piece."""
    (single,) = ((dim, atom) for dim, atom in enumerate(atoms) if isinstance(atom, AxisUse) and atom.axis == axis)
    dim, use = single
    if use.parent is None:
        return dim, None
    (parent,) = (index for index, atom in enumerate(atoms) if isinstance(atom, AxisUse) and atom.axis == use.parent)
    return dim, parent


def _balance(left: Tensor, right: Tensor, kind: str) -> Tensor:
    """The M that makes ‖M L‖² + ‖M⁻ᵀ R‖² least, see the module; L and R are `[.., n, anything]`."""
    if kind == INVERTIBLE:
        root, inverse_root = _roots(left @ left.mT)
        mean = inverse_root @ _roots(root @ (right @ right.mT) @ root)[0] @ inverse_root
        return _roots(mean)[0]
    squares = [side.square().sum(-1) for side in (left, right)]
    if kind == PAIR_SCALES:
        squares = [square.unflatten(-1, (2, -1)).sum(-2) for square in squares]
        squares = [torch.cat([square, square], -1) for square in squares]
    of_left, of_right = squares
    alive = (of_left > 0) & (of_right > 0)
    return torch.where(alive, of_right / torch.where(alive, of_left, 1), 1).pow(0.25)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a positive matrix and its inverse, small eigenvalues raised."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    largest = values.amax(-1, keepdim=True)
    values = torch.where(largest > 0, values.clamp_min(SMALLEST * largest), 1)
    root = values.sqrt()
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT
