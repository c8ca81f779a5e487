"""What a class needs is known without it, and is what the class itself says."""

import copy
import json

import pytest
import transformers

from hf_llfc.adapters import spec_for
from hf_llfc.adapters.needs import is_whole, needed_tensors
from hf_llfc.checkpoints.names import Layout
from tests.needs_table import FILE, classes_of, needs_of_type, tiny_configs

TABLE = json.loads(FILE.read_text())
FAST = ("bert", "llama", "qwen2", "vit", "modernbert", "bart")


@pytest.mark.parametrize(
    "model_type", [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in TABLE]
)
def test_the_table_is_what_the_classes_say(model_type):
    transformers.logging.set_verbosity_error()
    assert needs_of_type(model_type) == TABLE[model_type]


@pytest.mark.parametrize("model_type", FAST)
def test_a_class_that_lacks_one_of_its_tensors_is_not_whole(model_type):
    config = tiny_configs(model_type)
    for name, model_class in classes_of(config).items():
        if name not in TABLE[model_type]["classes"]:
            continue
        of_class = copy.deepcopy(config)
        of_class.architectures = [name]
        spec, shapes, values = spec_for(of_class), Layout(model_class, of_class).shapes, of_class.to_dict()
        assert is_whole(spec.bind(shapes), name, values), name
        for needed in needed_tensors(spec, name, values):
            assert not is_whole(spec.bind({key: shapes[key] for key in shapes if key != needed}), name, values), needed
        labels = {str(index): f"class {index}" for index in range(9)}
        has_labels = "labels" in spec.bind(shapes).sizes
        assert is_whole(spec.bind(shapes), name, values | {"id2label": labels}) != has_labels


def test_a_size_that_a_config_says_otherwise_is_not_whole():
    config = tiny_configs("bart")
    config.architectures = ["BartForConditionalGeneration"]
    spec, values = spec_for(config), config.to_dict()
    shapes = Layout(transformers.BartForConditionalGeneration, config).shapes
    assert is_whole(spec.bind(shapes), "BartForConditionalGeneration", values)
    longer = values | {"max_position_embeddings": values["max_position_embeddings"] + 1}
    assert not is_whole(spec.bind(shapes), "BartForConditionalGeneration", longer)


def test_only_the_class_can_tell_what_the_table_does_not_say():
    config = transformers.BertConfig(add_cross_attention=True, is_decoder=True, num_hidden_layers=1)
    config.architectures = ["BertForMaskedLM"]
    assert needed_tensors(spec_for(config), "BertForMaskedLM", config.to_dict()) is None
    assert needed_tensors(spec_for(config), "BertForMine", config.to_dict()) is None
