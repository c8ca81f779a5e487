import subprocess
import sys
from collections.abc import Iterator

import pytest
import transformers
from transformers import PretrainedConfig

import hf_llfc.adapters.registry as registry
from hf_llfc import PermutationSpec
from hf_llfc.adapters import known_model_types, register_adapter, spec_for
from hf_llfc.errors import SpecError
from tests.tiny_models import CONFIGS, tiny_config


class OwnConfig(PretrainedConfig):
    model_type = "own"


def own_adapter(config: PretrainedConfig) -> PermutationSpec:
    return PermutationSpec.from_lines(["a  x"], sizes={"x": 3}, symmetric=["x"], model_type=config.model_type)


@pytest.fixture(autouse=True)
def untouched_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


def test_every_family_of_the_table_is_found():
    assert {tiny_config(family).model_type for family in CONFIGS} <= set(registry.FAMILIES)
    for family in CONFIGS:
        config = tiny_config(family)
        assert spec_for(config).model_type == config.model_type
        assert spec_for(config) == PermutationSpec.from_config(config)


def test_an_unknown_model_type_suggests_and_says_what_to_do():
    with pytest.raises(SpecError) as error:
        spec_for(transformers.TimmWrapperConfig())
    message = str(error.value)
    assert message.startswith("no adapter for model type 'timm_wrapper'")
    assert "--align none" in message and "hf_llfc.register_adapter" in message
    config = OwnConfig()
    config.model_type = "lama"
    with pytest.raises(SpecError, match="did you mean 'llama'"):
        spec_for(config)


def test_an_adapter_of_ones_own():
    with pytest.raises(SpecError, match="no adapter for model type 'own'"):
        spec_for(OwnConfig())
    register_adapter("own", own_adapter)
    assert spec_for(OwnConfig()).symmetric_axes == ("x",)
    assert "own" in known_model_types() and known_model_types() == sorted(known_model_types())


def test_a_second_adapter_is_refused_and_the_same_one_again_is_not():
    register_adapter("own", own_adapter)
    register_adapter("own", own_adapter)
    with pytest.raises(SpecError, match="model type 'own' already has an adapter"):
        register_adapter("own", lambda config: own_adapter(config))
    with pytest.raises(SpecError, match="model type 'bert' already has an adapter"):
        register_adapter("bert", own_adapter)


def test_the_registry_is_lazy():
    code = (
        "import sys, hf_llfc.adapters; "
        "print(*sorted(m for m in sys.modules if m.startswith('hf_llfc.adapters.') or m == 'transformers'))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["hf_llfc.adapters.declare", "hf_llfc.adapters.registry"]
