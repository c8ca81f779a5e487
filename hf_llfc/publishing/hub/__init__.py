"""A finished folder on the Hub: checks before a run, the upload, errors in plain words."""
