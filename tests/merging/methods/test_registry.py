"""What is said of every method: names and defaults are mergekit's, wrong values are answered in one message."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_llfc.merging.methods
from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods import MERGE_METHODS, REQUIRED, Base, Need, Settings, find_method, seed_for

OURS_ALONE = {"tsv_m", "iso_c", "iso_cts", "wudi", "ace", "fisher", "feedback"}


def test_mergekits_methods_are_all_here_with_its_parameters_and_defaults():
    registry = pytest.importorskip("mergekit.merge_methods.registry", reason="mergekit is not installed")
    base_module = pytest.importorskip("mergekit.merge_methods.base")
    bases = {"required": Base.REQUIRED, "optional": Base.OPTIONAL, "ignored": Base.NONE}
    theirs = {method.spec.name: method.spec for method in registry.registered_methods()}
    assert set(theirs) | OURS_ALONE == set(MERGE_METHODS)
    for name, spec in theirs.items():
        ours = MERGE_METHODS[name]
        assert {parameter.name for parameter in ours.parameters} == {parameter.name for parameter in spec.parameters}
        for parameter in spec.parameters:
            own = ours.parameter(parameter.name)
            assert own.per_model == (parameter.scope is not base_module.ParameterScope.SHARED), (name, own.name)
            if parameter.required:
                assert own.default is REQUIRED, (name, own.name)
            elif (name, own.name) != ("passthrough", "scale"):  # none at all there, which is a factor of 1
                assert own.default == parameter.default and own.kind is parameter.value_type, (name, own.name)
        assert ours.base is bases[spec.contract.base.value], name
        beside = spec.contract.base.value == "required"
        low = spec.contract.min_non_base or spec.contract.min_inputs - beside
        high = spec.contract.max_non_base or (spec.contract.max_inputs and spec.contract.max_inputs - beside)
        assert ours.inputs == (max(1, low), high), name


@pytest.mark.parametrize("method", MERGE_METHODS.values(), ids=lambda method: method.name)
def test_a_method_says_what_it_has(method):
    assert find_method(method.name) is method
    assert method.help.endswith(".") and method.title and any(character.isdigit() for character in method.paper)
    assert all(parameter.help.endswith(".") for parameter in method.parameters)
    assert len({parameter.name for parameter in method.parameters}) == len(method.parameters)
    assert bool(method.reduces) == (method.need is not Need.ELEMENTWISE)
    function = method.function()
    assert "settings" in inspect.signature(function).parameters and function.__doc__
    for parameter in method.parameters:
        if parameter.default is not REQUIRED:
            assert parameter.checked(parameter.default) == parameter.default


@pytest.mark.parametrize(("name", "nearest"), [("tie", "ties"), ("SLERP", "slerp"), ("dare-ties", "dare_ties")])
def test_an_unknown_method_suggests_the_nearest(name, nearest):
    with pytest.raises(RecipeError, match=f"'{name}'; did you mean '{nearest}'"):
        find_method(name)


def test_all_that_is_wrong_with_settings_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        find_method("della").settings(
            {"wieght": 1.0, "density": [0.5, 1.5], "epsilon": [0.1], "rescale": 2, "lambda": "all", "int8_mask": None},
            models=2,
        )
    message = str(caught.value)
    for part in (
        "parameters of della: 7 problems",
        "no parameter 'wieght'; did you mean 'weight'?",
        "weight is missing",
        "density must be at most 1, not 1.5",
        "epsilon has 1 values for 2 models",
        "rescale must be true or false, not 2",
        "lambda must be a number, not 'all'",
        "int8_mask must be true or false, not None",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("method", "values", "models", "message"),
    [
        ("slerp", {"t": 0.5}, 2, "2 models are given beside the base, and it merges 1"),
        ("model_stock", {}, 1, "1 models are given beside the base, and it merges at least 2"),
        ("passthrough", {}, 2, "2 models are given, and it merges 1"),
        ("karcher", {"max_iter": 2.5}, 2, "max_iter must be a whole number, not 2.5"),
        ("karcher", {"max_iter": True}, 2, "max_iter must be a whole number, not True"),
        ("karcher", {"tol": float("nan")}, 2, "tol must be finite"),
        ("arcee_fusion", {"t": 1}, 1, "arcee_fusion has no parameter 't' \\(it has none\\)"),
        ("wudi", {"epsilon": 0}, 2, "epsilon must be at least 1e-09, not 0"),
    ],
)
def test_a_wrong_value_is_an_error(method, values, models, message):
    with pytest.raises(RecipeError, match=message):
        find_method(method).settings(values, models=models)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(RecipeError, match="no parameter 'lamda'; did you mean 'lambda'"):
        find_method("ties").parameter("lamda")


def test_settings_have_defaults_and_one_value_a_model():
    settings = find_method("ties").settings({"weight": 1, "density": (0.5, 0.2)}, models=2, seed=3, tensor="w")
    assert settings == Settings(
        {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0},
        {"weight": (1.0, 1.0), "density": (0.5, 0.2)},
        3,
        "w",
    )
    assert isinstance(settings.numbers("weight")[0], float)


def test_seeds_depend_on_recipe_tensor_and_model_alone():
    # The values are part of the contract: a recipe gives the same bytes with every version.
    assert seed_for(0, "model.layers.0.mlp.up_proj.weight", 1) == 6_772_720_695_740_641_170
    seeds = {seed_for(seed, tensor, model) for seed in (0, 1, -1) for tensor in ("a", "b", "a0") for model in (0, 1)}
    assert len(seeds) == 18


def test_the_registry_loads_no_tensor_library():
    package = Path(hf_llfc.merging.methods.__file__).parent
    code = f"""
import sys, types
merging = types.ModuleType("hf_llfc.merging")  # its own names are another matter
merging.__path__ = [{str(package.parent)!r}]
sys.modules["hf_llfc.merging"] = merging
from hf_llfc.merging.methods import find_method
find_method("ties").settings({{"weight": 1.0}}, models=2)
print(*sorted({{"torch", "numpy", "scipy"}} & sys.modules.keys()))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout.split(), answer.stderr) == (0, [], "")
