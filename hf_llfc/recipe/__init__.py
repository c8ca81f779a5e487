"""A recipe: the YAML of a run as typed, strict data.

A superset of what the merging community writes (`models`, `merge_method`, `base_model`, `parameters`, `dtype`,
`out_dtype`, `tokenizer_source`), plus `align`, `calibrate`, `diagnose`, `publish` and `output_dir`. Everything that is
wrong is collected and raised once; an unknown key names its path and the nearest key.

A relative path of a model, tokenizer or dataset is looked up beside the recipe file first, then in the working
directory; what is in neither place is a Hub id. `output_dir` is relative to the working directory.
"""

from typing import TYPE_CHECKING

from hf_llfc.foundation.lazy import lazy_names

if TYPE_CHECKING:
    from hf_llfc.recipe.reading import dump_recipe, load_align, load_data, load_recipe, plain_documents, renamed
    from hf_llfc.recipe.sections import (
        DTYPES,
        AlignSection,
        BatchNormSection,
        CalibrateSection,
        DiagnoseSection,
        KeepSection,
        MergeParameters,
        ModelEntry,
        ModelParameters,
        PublishSection,
        Recipe,
        WeightRule,
    )

__all__ = [
    "DTYPES",
    "AlignSection",
    "BatchNormSection",
    "CalibrateSection",
    "DiagnoseSection",
    "KeepSection",
    "MergeParameters",
    "ModelEntry",
    "ModelParameters",
    "PublishSection",
    "Recipe",
    "WeightRule",
    "dump_recipe",
    "load_align",
    "load_data",
    "load_recipe",
    "plain_documents",
    "renamed",
]

_READ = ("dump_recipe", "load_align", "load_data", "load_recipe", "plain_documents", "renamed")

# The sections alone, as the command line needs them for its help, load no YAML.
__getattr__ = lazy_names(__name__, {name: ".reading" if name in _READ else ".sections" for name in __all__})
