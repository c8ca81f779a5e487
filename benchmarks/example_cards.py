"""Makes the cards in model_cards/examples: each recipe is run on the trained parents, and its evidence is kept.

    python benchmarks/train_parents.py --out parents
    python benchmarks/example_cards.py --parents parents [--only fashion_vit_spawned …]
    python benchmarks/example_cards.py --render            # the same runs, their cards and pictures written anew

Of every run this keeps the card, what lies in llfc/ without the alignment, and the small files that say what model it
is. tests/publishing/test_examples.py renders each card again from these and compares.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tests.mlp_model  # noqa: F401 - registers the adapter of the MLPs
from hf_llfc.foundation.layout import CARD_FILE, LLFC_FOLDER
from hf_llfc.pipeline.flow import run
from hf_llfc.publishing import write_card
from hf_llfc.recipe import load_recipe

EXAMPLES = ROOT / "model_cards" / "examples"
KEPT = ("config.json", "tokenizer_config.json", "preprocessor_config.json", CARD_FILE)
LEFT_OUT = "*.safetensors"


@dataclass(frozen=True)
class Example:
    """A recipe that is run for its card.

    Attributes:
        recipe: Its name in recipes/.
        changes: What of it is replaced, as on the command line.
    """

    recipe: str
    changes: Sequence[str] = ()


TABLE = {
    "minilm_sentiment_two": Example("minilm_sentiment_two"),
    "minilm_sentiment_four": Example("minilm_sentiment_four"),
    "minilm_task_arithmetic": Example("minilm_task_arithmetic"),
    "minilm_ties": Example(
        "minilm_task_arithmetic",
        (
            "merge_method=ties",
            "models.0.parameters={weight: 0.5, density: 0.5}",
            "models.1.parameters={weight: 0.5, density: 0.5}",
            "parameters={normalize: true}",
        ),
    ),
    "fashion_mlp_independent": Example("fashion_mlp_independent"),
    "fashion_vit_spawned": Example("fashion_vit_spawned"),
    "fashion_vit_independent": Example("fashion_vit_independent"),
    "gpt2_bytes_branches": Example("gpt2_bytes_branches"),
}
"""Name of the example → what is run: verdicts for and against, every kind of region, task and method."""


def make(name: str, parents: Path) -> Path:
    """Runs one recipe and keeps its evidence; paths in it are as a reader of the recipe would have them."""
    example = TABLE[name]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "parents").symlink_to(parents.resolve())
        os.chdir(scratch)
        recipe = load_recipe(ROOT / "recipes" / f"{example.recipe}.yaml", [*example.changes, f"output_dir=runs/{name}"])
        made = run(recipe).folder.resolve()
        kept = EXAMPLES / name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(made / LLFC_FOLDER, kept / LLFC_FOLDER, ignore=shutil.ignore_patterns(LEFT_OUT))
        for file in filter(Path.is_file, (made / file for file in KEPT)):
            shutil.copy(file, kept)
        os.chdir(ROOT)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=Path, help="what train_parents.py made")
    parser.add_argument("--only", nargs="+", choices=TABLE, default=list(TABLE), metavar="NAME")
    parser.add_argument("--render", action="store_true", help="write cards again without running anything")
    options = parser.parse_args()
    if options.parents is None and not options.render:
        parser.error("give --parents, or --render")
    for name in options.only:
        print(write_card(EXAMPLES / name) if options.render else make(name, options.parents))


if __name__ == "__main__":
    main()
