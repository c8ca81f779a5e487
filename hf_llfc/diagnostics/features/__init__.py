"""Where features are: layers, blocks, a trial run that finds them, hooks that take them."""
