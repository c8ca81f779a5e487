"""What a merge method is told about one tensor: numbers, already resolved, and where its randomness comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_llfc.errors import RecipeError

Value = float | int | bool
"""What a parameter may be."""

ZERO_SUM = 1e-6
"""Sums of weights below this share of the sum of their magnitudes are what float32 leaves of zero."""


def seed_for(seed: int, tensor: str, model: int) -> int:
    """The seed of the draws for one tensor of one model.

    It depends on nothing but its arguments, so that a random merge has the same bytes for any number of threads and
    processes, and in whatever order tensors are merged. The draws of one model do not depend on those of another.

    Args:
        seed: The recipe's seed.
        tensor: Name of the tensor.
        model: Index of the model among those that are merged, the base not counted.

    Returns:
        An integer from 0 to 2⁶⁴ − 1, the xxh3 hash of the three.
    """
    import xxhash

    return xxhash.xxh3_64_intdigest(f"{seed}\0{tensor}\0{model}".encode())


@dataclass(frozen=True)
class Settings:
    """Values of a method's parameters for one tensor, and the source of its random draws.

    Make one with `MergeMethod.settings`, which checks the values and fills in the defaults.

    Attributes:
        shared: Parameter → its value, of those that the whole merge has.
        of_models: Parameter → one value a model, of those that every model has; the base has none.
        seed: The recipe's seed.
        tensor: Name of the tensor; random methods draw anew for every tensor.
    """

    shared: Mapping[str, Value] = field(default_factory=dict)
    of_models: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    seed: int = 0
    tensor: str = "tensor"

    def number(self, name: str) -> float:
        """The value of a parameter of the whole merge that is a number."""
        return float(self.shared[name])

    def count(self, name: str) -> int:
        """The value of a parameter of the whole merge that is a whole number."""
        return int(self.shared[name])

    def switch(self, name: str) -> bool:
        """Whether a parameter of the whole merge is on."""
        return bool(self.shared[name])

    def numbers(self, name: str) -> tuple[float, ...]:
        """One number a model."""
        return tuple(float(value) for value in self.of_models[name])

    def seed_of(self, model: int) -> int:
        """The seed of the draws for a model, see `seed_for`."""
        return seed_for(self.seed, self.tensor, model)

    def shares(self, name: str = "weight") -> tuple[float, ...]:
        """One number a model, divided by their sum.

        Raises:
            RecipeError: The sum is zero.
        """
        weights = self.numbers(name)
        total = sum(weights)
        if is_zero(total, weights):
            raise RecipeError(
                f"{self.tensor}: the values of {name}, {', '.join(map(str, weights))}, sum to zero and cannot be "
                "divided by their sum; give others, or set normalize (of multislerp, normalize_weights) to false"
            )
        return tuple(weight / total for weight in weights)


def is_zero(total: float, weights: tuple[float, ...]) -> bool:
    """Whether a sum of weights is zero but for rounding: at most a millionth of the sum of their magnitudes."""
    return abs(total) <= ZERO_SUM * sum(abs(weight) for weight in weights)
