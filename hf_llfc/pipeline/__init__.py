"""A recipe run from the parents to the Hub, and its stages alone."""
