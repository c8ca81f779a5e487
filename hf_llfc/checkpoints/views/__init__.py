"""A checkpoint seen otherwise: an adapter folded in, the canonical form, a united vocabulary."""
