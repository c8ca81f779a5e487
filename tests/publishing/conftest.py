"""The double of the Hub for every test of this folder."""

from tests.hub_double import hub

__all__ = ["hub"]
