"""Every model type of transformers against its row in docs/model_types.md."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from hf_llfc.adapters import known_model_types, spec_for
from hf_llfc.adapters.derived.shrink import MAX_PARAMETERS, build_on_meta, parameter_count, shrunken
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.header import natural_order
from hf_llfc.errors import CheckpointError, SpecError
from hf_llfc.parents.specs import SAVED_IN_OTHER_ORDER, is_sorted_as_saved, open_weights
from tests import zoo_page
from tests.zoo import VARIANTS, varied_config, zoo_result, zoo_types
from tests.zoo_table import examine, reason_not_to_run

PAGE = (Path(__file__).parents[2] / "docs" / "model_types.md").read_text()

# Structurally different ones without an adapter; the others run with -m zoo.
FAST = (
    "bit",
    "blip",
    "fnet",
    "funnel",
    "groupvit",
    "jetmoe",
    "levit",
    "mobilevit",
    "moshi",
    "opt",
    "poolformer",
    "xlnet",
)

# Saved in the order of names, and in another.
ORDERED = ("bert", "gpt_neox", "llama", "olmoe", "opt")


def rows() -> dict[str, str]:
    """Model type → its row, of both tables of the page."""
    found = [
        line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| |", "| model type"))
    ]
    return {line.split("|")[1].strip(): line for line in found if line.split("|")[1].strip() in zoo_types()}


def test_the_page_has_every_model_type_once():
    for model_type in zoo_types():
        assert PAGE.count(f"\n| {model_type} |") == 1, model_type


def test_the_page_knows_which_specs_are_written_by_hand():
    for model_type, row in rows().items():
        cells = [cell.strip() for cell in row.split("|")]
        if cells[-2] == "✓":
            expected = "hand-written" if model_type in known_model_types() else "derived"
            assert cells[3] == expected, model_type


def test_at_least_19_of_20_model_types_that_run_are_verified():
    """The counts at the head of the page are those of its rows."""
    built = [row for row in rows().values() if row.count("|") > 4]
    verified = [row for row in built if row.rstrip(" |").endswith("✓")]
    assert f"| run under 5 M parameters | {len(built)} |" in PAGE
    assert f"| verified | {len(verified)} |" in PAGE
    assert len(verified) >= 0.95 * len(built)


@pytest.mark.parametrize(
    "model_type", [pytest.param(each, marks=() if each in FAST else pytest.mark.zoo) for each in zoo_types()]
)
def test_a_model_type_is_as_its_row_says(model_type: str):
    result = zoo_result(model_type, dtype=torch.float64)
    row = rows()[model_type]
    if row.count("|") <= 4:
        assert result.reason is not None or reason_not_to_run(result.model, result.inputs) is not None
        return
    assert result.model is not None and result.inputs is not None, result.reason
    try:
        found = examine(model_type, result.model, result.inputs)
    except SpecError as error:
        found = f"SpecError: {error}"
    facts = found if isinstance(found, dict) else {"reason": found}
    stage = "done" if isinstance(found, dict) else "check"
    examined = {"type": model_type, "stage": stage, "class": type(result.model).__name__, "reason": None, **facts}
    assert zoo_page.page_row(examined) == row


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(each, marks=() if each in ORDERED else pytest.mark.zoo) for each in sorted(known_model_types())],
)
def test_weights_alone_are_in_the_order_in_which_the_class_saves_them(model_type: str, tmp_path: Path):
    result = zoo_result(model_type)
    if result.model is None:
        pytest.skip(str(result.reason))
    result.model.save_pretrained(tmp_path)
    try:
        light, full = open_weights(tmp_path), open_checkpoint(tmp_path)
    except CheckpointError as error:
        pytest.skip(str(error))  # a shrunken config that its class does not read back
    if is_sorted_as_saved(light):
        assert list(light.tensors) == list(full.tensors)
    elif model_type in SAVED_IN_OTHER_ORDER:
        assert sorted(full.tensors, key=natural_order) != list(full.tensors)


# Types whose specs are derived, and those that stood out: lists layer by layer, kinds of layers, parts of other types.
DERIVED = [model_type for model_type in zoo_types() if model_type not in known_model_types()]
VARIED = (*FAST, "gemma4", "lighton_ocr", "mgp-str", "qwen3_omni_moe_thinker", "ultrabert", "vivit")


def varied(model_type: str, variant: str) -> PreTrainedConfig:
    """A config of other sizes; skipped where transformers builds no model of it, or of the default one."""
    try:
        config = varied_config(model_type, variant)
        build_on_meta(config)
        rows()[model_type]
    except Exception as error:  # whatever a config class or modelling file raises of sizes that it does not take
        pytest.skip(str(error))
    return config


@pytest.mark.parametrize(
    "model_type", [pytest.param(each, marks=() if each in VARIED else pytest.mark.zoo) for each in DERIVED]
)
def test_configs_of_other_sizes_can_be_shrunk(model_type: str):
    if rows()[model_type].count("|") <= 4:
        pytest.skip("no tiny model of it runs, as its row says")
    for variant in VARIANTS:
        try:
            config = varied_config(model_type, variant)
            build_on_meta(config)
        except Exception:  # whatever a config class or modelling file raises of sizes that it does not take
            continue
        small = shrunken(config)
        assert parameter_count(build_on_meta(small)) < MAX_PARAMETERS, variant
        assert small.model_type == config.model_type


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", DERIVED)
def test_configs_of_other_sizes_have_a_spec(model_type: str, variant: str):
    config = varied(model_type, variant)
    if rows()[model_type].endswith("✓ |"):
        assert spec_for(config).origin == "derived"
