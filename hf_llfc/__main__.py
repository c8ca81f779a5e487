"""`accelerate launch -m hf_llfc RECIPE [key=value …]`, and `python -m hf_llfc COMMAND …`."""

import os
import sys

# `python -m` looks for modules in the working directory first, which a stranger may have filled.
if sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from hf_llfc.cli import run_main

sys.exit(run_main())
