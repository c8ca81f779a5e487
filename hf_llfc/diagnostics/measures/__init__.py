"""What is measured beside LLFC, one file a measure."""
