"""One of two processes that run a recipe; the second one is killed when it writes its first tensor.

python killed_rank.py RECIPE
"""

import os
import sys

from hf_llfc.cli import main
from tests.faults.harness import Points, kill

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Points(1, kill, calls=("pwrite",)).install()
    sys.exit(main(["run", sys.argv[1]]))
