"""The model card: sections, results, usage, metadata, templates."""
