"""Hand-written permutation specs, one file a family."""
