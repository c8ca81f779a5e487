"""How far results are from mergekit's, recipe by recipe: `python -m benchmarks.mergekit_recipes [--write]`.

Both programs run the recipes of tests/pipeline/test_mergekit_recipes.py on tiny models. What is printed is the largest
difference over all tensors, in units of the largest entry of each. `--write` puts the table into docs/mergekit.md.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from tests.pipeline.test_mergekit_recipes import RECIPES, VOCABULARIES, differences, merge_all

PAGE = Path(__file__).parents[1] / "docs" / "mergekit.md"
MARKED = re.compile(r"(<!-- differences -->\n).*?(<!-- end of differences -->)", re.DOTALL)


def main() -> None:
    """Runs both programs and prints the table."""
    rows = ["| recipe | largest difference |", "|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, each in zip([*RECIPES, *VOCABULARIES], merge_all(Path(folder)), strict=True):
            rows.append(f"| {name} | {max(differences(*each).values()):.1e} |")
    table = "\n".join(rows)
    print(table)
    if "--write" in sys.argv:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(MARKED.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
