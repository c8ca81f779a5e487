"""The models of a merge: opened, checked, bound to their spec, in the coordinates of the reference."""
