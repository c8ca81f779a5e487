"""`accelerate launch -m hf_llfc RECIPE [key=value …]`, and `python -m hf_llfc COMMAND …`."""

import sys

from hf_llfc.cli import run_main

sys.exit(run_main())
