"""Hypothesis as tests need it: the same examples every time, no clock, no folder left behind."""

from hypothesis import settings

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("tests")
