"""How a number is rounded for a reader: the same everywhere, whatever noise its last bits hold."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal


def rounded(value: float, decimals: int) -> str:
    """A finite number with a fixed number of decimals.

    Two ways to compute one number differ by some 1e-16 of it. Where it lies half-way between two texts (47.525), that
    must not decide: noise below the tenth decimal is dropped first, and half rounds away from zero.
    """
    text = Decimal(repr(round(value, 10))).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
    return f"{text if text else abs(text):f}"
