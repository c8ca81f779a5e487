"""mergekit's forms of a recipe: what they are read as, and what is wrong with those that are wrong."""

import pytest
import yaml

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods import MERGE_METHODS
from hf_llfc.recipe import MergeParameters, ModelParameters, dump_recipe, load_recipe
from hf_llfc.recipe.tokenizer import TokenizerSection, TokenRule, TokenSource


def recipe(**keys):
    models = [{"model": f"org/{name}", "parameters": {"weight": 0.5}} for name in "ab"]
    return {"models": models, "output_dir": "out", **keys}


def problems_of(content):
    with pytest.raises(RecipeError) as caught:
        load_recipe(content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("org/a@main+org/lora", "org/a@main+org/lora"),
        ({"model": "org/a"}, "org/a"),
        ({"path": "org/a", "revision": "main"}, "org/a@main"),
        ({"model": {"path": "org/a", "revision": 3}, "lora": "org/lora"}, "org/a@3+org/lora"),
        ({"model": {"path": "org/a"}, "lora": {"path": "org/lora", "revision": "v1"}}, "org/a+org/lora@v1"),
    ],
)
def test_a_model_may_be_named_by_a_mapping(reference, name):
    content = recipe(merge_method="task_arithmetic", base_model=reference, tokenizer_source=reference)
    content["models"][0]["model"] = reference if name != "org/a" else {"model": {"path": "org/x"}}
    read = load_recipe(content)
    assert read.base_model == read.tokenizer_source == name
    assert read.models[0].model == ("org/b" if name != "org/a" else "org/x")  # the base among the models is taken out


def test_another_class_is_taken_by_the_name_of_the_model():
    content = recipe()
    content["models"][0]["model"] = {"model": "org/a", "override_architecture": "LlamaForCausalLM"}
    read = load_recipe(content)
    assert read.override_architecture == {"org/a": "LlamaForCausalLM"}
    assert load_recipe(yaml.safe_load(dump_recipe(read))) == read


def test_a_mapping_is_looked_up_beside_the_recipe(tmp_path):
    (tmp_path / "a").mkdir()
    content = recipe(tokenizer_source={"model": {"path": "a"}})
    content["models"][0]["model"] = {"path": "a"}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(content))
    read = load_recipe(tmp_path / "r.yml")
    assert read.models[0].model == read.tokenizer_source == str(tmp_path / "a")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"modle": "org/a"}, "base_model.modle: unknown key; did you mean 'model'?"),
        ({"lora": "org/lora"}, "base_model.model: missing"),
        ({"model": {"pth": "org/a"}}, "base_model.model.pth: unknown key; did you mean 'path'?"),
        ({"model": "org/a", "lora": None}, "base_model.lora: names no adapter"),
        ({"model": "org/a", "lora": {"revision": "main"}}, "base_model.lora.path: missing"),
        ({"model": "org/a", "lora": 3}, "base_model.lora: text or `path` and `revision` is expected, found 3"),
        (
            {"model": {"path": "org/a", "revision": []}},
            "base_model.model.revision: a branch, tag or commit is",
        ),
        ({"model": {"path": "org/a@v", "revision": "w"}}, "base_model.model.revision: org/a@v has a revision already"),
        ({"model": {"path": "/tmp", "revision": "main"}}, "base_model.model.revision: /tmp is a folder, which has no"),
        (
            {"model": "org/a", "override_architecture": 1},
            "base_model.override_architecture: the name of a class is expected",
        ),
        (["org/a"], "base_model: the name of a model, or a mapping of model, lora, override_architecture"),
    ],
)
def test_a_wrong_mapping_is_one_message_with_its_path(reference, expected):
    assert expected in problems_of(recipe(merge_method="ties", base_model=reference))


def test_two_classes_for_one_model_are_refused():
    named = {"model": "org/a", "override_architecture": "LlamaForCausalLM"}
    other = {**named, "override_architecture": "MistralForCausalLM"}
    content = recipe(merge_method="ties", base_model=named, tokenizer_source=other)
    assert "tokenizer_source.override_architecture: org/a is LlamaForCausalLM elsewhere" in problems_of(content)


def test_parameters_once_for_all_reach_models_that_have_none():
    models = [
        {"model": "org/a"},
        {"model": "org/b", "parameters": {"weight": 0.1}},
        {"model": "org/c", "parameters": {}},
    ]
    read = load_recipe(recipe(models=models, parameters={"weight": 0.3, "normalize": False}))
    assert read.weights == (0.3, 0.1, 0.3)
    assert read.parameters == MergeParameters(normalize=False, weight=0.3)
    assert load_recipe(read.to_dict()) == read


def test_a_sum_whose_lambda_differs_is_merged_tensor_by_tensor():
    parameters = {"lambda": [0.1, 1.0], "weight": 0.4}
    read = load_recipe(recipe(merge_method="task_arithmetic", base_model="org/c", parameters=parameters))
    assert read.method is MERGE_METHODS["task_arithmetic"] and read.weights is None
    assert read.models[0].parameters == ModelParameters(settings={"weight": 0.5})
    assert load_recipe(read.to_dict()) == read


def test_the_base_of_a_method_without_one_is_the_first_of_its_models():
    read = load_recipe(
        recipe(base_model="org/b", align={"method": "weight_matching", "reference": 1}, tokenizer_source=0)
    )
    assert [entry.model for entry in read.models] == ["org/b", "org/a"]
    assert read.base is None and read.reference_index == 0 and read.tokenizer_source == 1
    assert load_recipe(read.to_dict()) == read
    added = load_recipe(recipe(base_model="org/c", parameters={"weight": 0.2}, tokenizer_source="base"))
    assert [entry.model for entry in added.models] == ["org/c", "org/a", "org/b"]
    assert added.weights == pytest.approx((1 / 6, 5 / 12, 5 / 12))


def test_an_index_of_the_base_follows_it_out_of_the_models():
    for source, expected in ((0, "base"), (1, 0)):
        content = recipe(merge_method="task_arithmetic", base_model="org/a", tokenizer_source=source)
        assert load_recipe(content).tokenizer_source == expected


def test_the_section_of_the_tokenizer():
    tokens = {
        "<a>": {"source": {"kind": "zero"}},
        "<b>": {"source": {"kind": "model_token", "model": {"model": {"path": "org/a"}}, "token_id": 3}, "force": True},
        "<c>": {"source": "org/b"},
        "<d>": None,
    }
    read = load_recipe(recipe(tokenizer={"tokens": tokens, "pad_to_multiple_of": 8}))
    assert read.tokenizer_source == "union"
    assert read.tokenizer == TokenizerSection(
        tokens={
            "<a>": TokenRule(TokenSource("zero")),
            "<b>": TokenRule(TokenSource("model_token", "org/a", token_id=3), True),
            "<c>": TokenRule("org/b"),
            "<d>": TokenRule(),
        },
        pad_to_multiple_of=8,
    )
    assert load_recipe(yaml.safe_load(dump_recipe(read))) == read
    plain = load_recipe(recipe(tokenizer={"source": {"path": "org/a"}}))
    assert (plain.tokenizer_source, plain.tokenizer) == ("org/a", None)


def test_words_of_other_recipes():
    read = load_recipe(recipe(name="mine", dtype="torch.bfloat16", random_seed=7, int8_mask=True, chat_template="auto"))
    assert (read.document, read.dtype, read.seed, read.chat_template) == ("mine", "bfloat16", 7, "auto")
    assert load_recipe(recipe(parameters={"normalize": 0.0})).normalizes is False


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"parameters": {"weight": [0.5]}}, "parameters.weight: a gradient has two values or more"),
        ({"merge_method": "karcher", "parameters": {"tol": []}}, "parameters.tol: an empty list is no gradient"),
        ({"merge_method": "karcher", "parameters": {"tol": [1]}}, "parameters.tol: a gradient has two values or more"),
        ({"parameters": {"weight": {"value": [1]}}}, "parameters.weight.0.value: a gradient has two values or more"),
        ({"parameters": {"normalize": 2}}, "parameters.normalize: true or false is expected, found 2"),
        ({"parameters": {"gamma": 1}}, "parameters.gamma: unknown key (linear has normalize, weight, lambda; gamma is"),
        ({"parameters": {"wieght": 1}}, "parameters.wieght: unknown key; did you mean 'weight'? (linear has"),
        ({"normalize": True}, "normalize: stands under `parameters`; move it there, or remove it"),
        ({"seed": 1, "random_seed": 2}, "random_seed: is given twice, also as seed"),
        (
            {"tokenizer": {"source": "union"}, "tokenizer_source": "union"},
            "tokenizer.source: stands beside token",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: at least 1 is expected, found 0"),
        ({"tokenizer": {"tokens": ["<a>"]}}, "tokenizer.tokens: a mapping of tokens to rules is expected"),
        ({"tokenizer": {"tokens": {5: {}}}}, "tokenizer.tokens.5: a token is text; put it in quotes"),
        (
            {"tokenizer": {"tokens": {"<a>": {"sorce": 1}}}},
            "tokenizer.tokens.<a>.sorce: unknown key; did you mean",
        ),
        ({"tokenizer": {"tokens": {"<a>": {"force": True}}}}, "tokenizer.tokens.<a>.source: missing; `force` replaces"),
        (
            {"tokenizer": {"tokens": {"<a>": {"source": "org/A2"}}}},
            "tokenizer.tokens.<a>.source: 'org/A2' is none of the models; did you mean 'org/a'?",
        ),
        (
            {"tokenizer": {"tokens": {"<a>": {"source": {"kind": "zeros"}}}}},
            "tokenizer.tokens.<a>.source.kind: unknown 'zeros'; did you mean 'zero'?",
        ),
        (
            {"tokenizer": {"tokens": {"<a>": {"source": {"kind": "model_token", "model": "org/a"}}}}},
            "tokenizer.tokens.<a>.source.token: missing; give the token, or its `token_id`",
        ),
        ({"chat_template": "chatlm"}, "chat_template: 'chatlm' is no template; did you mean 'chatml'?"),
        ({"override_architecture": {"org/c": "X"}}, "override_architecture: 'org/c' is none of the models"),
    ],
)
def test_what_is_wrong_is_one_message_with_its_path(change, expected):
    assert expected in problems_of(recipe(**change))


def test_a_base_that_cannot_be_one_of_the_models():
    content = {"models": [{"model": "org/a"}], "merge_method": "passthrough", "base_model": "org/b", "output_dir": "o"}
    assert "base_model: passthrough has no base, and takes 1 model; remove one of them" in problems_of(content)
