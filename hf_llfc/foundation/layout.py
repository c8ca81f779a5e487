"""Where what is ours lies in an output folder."""

LLFC_FOLDER = "llfc"
"""Holds everything that is ours but the card: some runtimes load every safetensors file beside a model."""

CARD_FILE = "README.md"

RECIPE_FILE = "recipe.yaml"
"""The recipe as run, revisions as commits."""

REPORT_FILE = "llfc_report.json"

"""What another program was asked for that computed the weights."""

RUN_FILE = "run.json"
"""What neither recipe nor report says of a run; see `record`."""

MADE_FROM_FILE = "made_from.sha256"
"""Tells what a document was merged from, so that it is not merged again."""

FILES_FILE = "files.json"
"""The files that a run wrote: `--overwrite` replaces a folder that holds no others."""

PAGE_FILE = "report.html"
"""The interactive report."""
