"""The double of the Hub and the browser for every test of this folder."""

from tests.browser import browse, chromium
from tests.hub_double import hub

__all__ = ["browse", "chromium", "hub"]
