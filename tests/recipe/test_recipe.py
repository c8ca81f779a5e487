"""Recipes: strict, typed, every problem at once, and the same again when written and read."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_llfc.errors import RecipeError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.foundation.limited_yaml import parse_yaml
from hf_llfc.recipe import (
    AlignSection,
    BatchNormSection,
    DiagnoseSection,
    ModelParameters,
    Recipe,
    WeightRule,
    dump_recipe,
    load_recipe,
)

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

PAIR = {
    "models": [
        {"model": "org/a", "parameters": {"weight": 0.25}},
        {"model": "org/b@main", "parameters": {"weight": 0.75}},
    ],
    "output_dir": "out",
}
DATA = {"task": "text-classification", "dataset": "org/data"}

EVERYTHING = {
    "models": [
        {
            "model": "org/a@abc",
            "parameters": {
                "weight": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"filter": "heads", "value": 1}, {"value": 0.5}]
            },
            "trust_remote_code": True,
        },
        {"model": "org/b", "parameters": {"weight": [1, 0.5]}},
        {"model": "org/c", "parameters": {"weight": -0.5}},
    ],
    "merge_method": "task_arithmetic",
    "base_model": "org/base",
    "parameters": {"normalize": False, "lambda": 0.4},
    "dtype": "float32",
    "out_dtype": "bfloat16",
    "tokenizer_source": "base",
    "align": {
        "method": "activation_matching",
        "reference": "org/b",
        "axes": ["heads", "neurons.*"],
        "exclude": ["residual"],
        "start": "activation_matching",
        "restarts": 3,
        "seed": 5,
        "max_sweeps": 7,
        "calibration": {**DATA, "split": "train[:100]", "samples": 64},
    },
    "diagnose": {
        **DATA,
        "name": "plain",
        "split": "test",
        "text_column": "premise",
        "text_pair_column": "hypothesis",
        "label_column": "answer",
        "tokenizer": "org/tokenizer",
        "samples": 100,
        "seed": 3,
        "batch_size": 8,
        "max_length": 64,
        "metric": ["accuracy", "f1"],
        "label_map": {"yes": 1, "no": 0},
        "alphas": [0, 0.25, 0.5, 1],
        "layers": ["bert.encoder.layer.*"],
        "batch_norm": {"recompute": True, "split": "train", "samples": 256},
    },
    "publish": {"repo_id": "me/merge", "private": True, "create_pr": True, "license": "apache-2.0"},
    "output_dir": "runs/everything",
    "seed": 11,
    "overwrite": True,
    "max_shard_size": "2GB",
    "max_memory": "1MiB",
}


def changed(**keys):
    return {**PAIR, **keys}


def problems_of(content, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(content, overrides)
    return str(caught.value)


class TestReading:
    def test_what_the_merging_community_writes(self, tmp_path):
        path = tmp_path / "merge.yml"
        path.write_text(
            """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight:
        - filter: mlp
          value: [0, 0.5]
        - value: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: [1e-1, 0.7, 5]
merge_method: linear
parameters: {normalize: true}
dtype: float16
output_dir: out
""",
            encoding="utf-8",
        )
        recipe = load_recipe(path)
        assert [entry.model for entry in recipe.models] == ["psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B"]
        assert recipe.models[0].parameters.weight == (WeightRule("mlp", (0.0, 0.5)), WeightRule(None, 1.0))
        assert recipe.models[1].parameters.weight == (0.1, 0.7, 5.0)
        assert recipe.parameters.normalize is True
        assert recipe.result_dtype == "float16"
        assert recipe.align == AlignSection(method="none")
        assert recipe.diagnose is None
        assert recipe.publish is None

    def test_every_key(self):
        recipe = load_recipe(EVERYTHING)
        assert recipe.models[0].parameters.weight == (
            WeightRule("mlp", (0.0, 0.5, 1.0)),
            WeightRule("heads", 1.0),
            WeightRule(None, 0.5),
        )
        assert recipe.models[0].trust_remote_code
        assert recipe.parameters.scale == 0.4
        assert recipe.result_dtype == "bfloat16"
        assert recipe.align.reference == "org/b"
        assert recipe.reference_index == 1
        assert recipe.align.calibration == EvaluationConfig(
            "text-classification", "org/data", split="train[:100]", samples=64, seed=11
        )
        assert recipe.diagnose.data.seed == 3
        assert recipe.diagnose.data.metric == ("accuracy", "f1")
        assert recipe.diagnose.alphas == (0.0, 0.25, 0.5, 1.0)
        assert recipe.diagnose.batch_norm.data.split == "train"
        assert recipe.diagnose.batch_norm.data.text_column == "premise"
        assert recipe.max_shard_size == 2_000_000_000
        assert recipe.max_memory == 2**20
        assert dataclasses.is_dataclass(recipe)
        with pytest.raises(dataclasses.FrozenInstanceError):
            recipe.output_dir = "elsewhere"

    def test_the_data_keys_are_the_fields_of_the_evaluation(self):
        special = {"dataset": "org/data", "task": "text-generation", "metric": "perplexity", "max_length": 32}
        for field in dataclasses.fields(EvaluationConfig):
            default = None if field.default is dataclasses.MISSING else field.default
            section = {**DATA, field.name: special.get(field.name, default)}
            value = vars(load_recipe(changed(diagnose=section)).diagnose.data)[field.name]
            assert value == section[field.name]

    def test_models_without_weights_get_equal_shares(self):
        recipe = load_recipe({"models": [{"model": "a"}, {"model": "b"}], "output_dir": "out"})
        assert [entry.parameters for entry in recipe.models] == [None, None]
        assert load_recipe({"models": [{"model": "a", "parameters": {}}], "output_dir": "o"}).models[
            0
        ].parameters == ModelParameters(1.0)

    def test_a_seed_reaches_every_section_that_has_none(self):
        content = changed(
            seed=9,
            align={"method": "activation_matching", "calibration": {**DATA, "seed": 4}},
            diagnose={**DATA, "batch_norm": {"split": "train"}},
        )
        recipe = load_recipe(content)
        assert recipe.align.seed == 9
        assert recipe.align.calibration.seed == 4
        assert recipe.diagnose.data.seed == 9
        assert recipe.diagnose.batch_norm.data.seed == 9

    def test_alphas_as_a_number_are_equal_steps(self):
        recipe = load_recipe(changed(diagnose={**DATA, "alphas": 5}))
        assert recipe.diagnose.alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
        assert load_recipe(changed(diagnose=DATA)).diagnose.alphas == tuple(round(i / 10, 12) for i in range(11))

    @pytest.mark.parametrize(
        ("written", "size"),
        [
            ("5GB", 5 * 10**9),
            ("1.5 GB", 15 * 10**8),
            ("200MiB", 200 * 2**20),
            ("10kb", 10**4),
            (12345, 12345),
            ("77", 77),
        ],
    )
    def test_sizes(self, written, size):
        assert load_recipe(changed(max_shard_size=written)).max_shard_size == size

    def test_the_base_among_the_models_is_left_out(self, caplog):
        content = {
            "models": [{"model": "base"}, *PAIR["models"]],
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "align": {"method": "weight_matching", "reference": 2},
            "output_dir": "out",
        }
        recipe = load_recipe(content)
        assert [entry.model for entry in recipe.models] == ["org/a", "org/b@main"]
        assert recipe.reference_index == 1
        content["models"][0]["parameters"] = {"weight": 0.5}
        with caplog.at_level("WARNING"):
            assert load_recipe(content) == recipe
        assert "models.0.parameters: this is the base_model, whose parameters count for nothing" in caplog.text

    def test_empty_values_are_defaults(self):
        recipe = load_recipe(
            changed(align={"method": "weight_matching", "exclude": None, "seed": None}, overwrite=None, parameters=None)
        )
        assert recipe.align == AlignSection()
        assert recipe.overwrite is False

    def test_the_mapping_of_the_caller_is_not_changed(self):
        content = {**PAIR, "models": [dict(entry) for entry in PAIR["models"]]}
        load_recipe(content, ["models.0.model=other", "align.method=none"])
        assert content == PAIR


class TestPaths:
    def test_beside_the_recipe_first_then_the_working_directory(self, tmp_path, monkeypatch):
        beside, here = tmp_path / "recipes", tmp_path / "work"
        for folder in (beside / "a", here / "a", here / "b"):
            folder.mkdir(parents=True)
        monkeypatch.chdir(here)
        content = {
            "models": [{"model": "a"}, {"model": "b"}, {"model": "org/c"}],
            "align": {"method": "weight_matching", "reference": "a"},
            "tokenizer_source": "a",
            "diagnose": {**DATA, "dataset": "a", "tokenizer": "a"},
            "output_dir": "a",
        }
        (beside / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        recipe = load_recipe(beside / "recipe.yaml")
        located = str(beside / "a")
        assert [entry.model for entry in recipe.models] == [located, "b", "org/c"]
        assert recipe.reference_index == 0
        assert recipe.tokenizer_source == recipe.diagnose.data.dataset == recipe.diagnose.data.tokenizer == located
        assert recipe.output_dir == "a"

    def test_a_mapping_has_no_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert load_recipe(PAIR).models[0].model == "org/a"


class TestRoundTrip:
    @pytest.mark.parametrize("content", [PAIR, EVERYTHING, changed(diagnose=DATA), changed(seed=4, align={"seed": 0})])
    def test_what_is_written_reads_the_same(self, content, tmp_path):
        recipe = load_recipe(content)
        assert load_recipe(recipe.to_dict()) == recipe
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe

    def test_only_what_was_said_is_written(self):
        assert load_recipe(PAIR).to_dict() == {**PAIR, "seed": 0}

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_recipes_of_this_repository(self, path):
        recipe = load_recipe(path)
        assert load_recipe(recipe.to_dict()) == recipe
        assert recipe.output_dir == f"runs/{path.stem}"
        assert recipe.diagnose is not None
        header = re.split(r"^(?:models|slices):", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
        assert all(line.startswith("#") or not line for line in header.splitlines())
        for word in (
            "parents",
            f"run       hf-llfc run recipes/{path.name}",
            "accelerate launch -m hf_llfc",
            "numbers",
        ):
            assert word in header

    def test_there_are_recipes(self):
        assert len(RECIPES) >= 10


class TestOverrides:
    def test_values_are_yaml(self):
        recipe = load_recipe(
            PAIR,
            [
                "models.1.model=org/c",
                "models.0.parameters.weight=0.4",
                "models.1.parameters={weight: 6e-1}",
                "align.method=weight_matching",
                "align.exclude=[residual]",
                "overwrite=true",
                "diagnose.task=fill-mask",
                "diagnose.dataset=org/text",
                "diagnose.samples=10",
                "dtype=",
            ],
        )
        assert recipe.models[1].model == "org/c"
        assert recipe.models[0].parameters.weight == 0.4
        assert recipe.models[1].parameters.weight == 0.6
        assert recipe.align.exclude == ("residual",)
        assert recipe.overwrite is True
        assert recipe.diagnose.data.samples == 10
        assert recipe.dtype is None

    def test_a_value_may_hold_an_equals_sign(self):
        assert load_recipe(PAIR, ["output_dir=runs/alpha=0.5"]).output_dir == "runs/alpha=0.5"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("overwrite", "write key.sub=value"),
            ("=1", "write key.sub=value"),
            ("models.5.model=x", "'5' is not one of the 2 entries"),
            ("models.first.model=x", "'first' is not one of the 2 entries"),
            ("output_dir.sub=x", "'output_dir' has no keys below it"),
            ("align.exclude=[a", "not valid YAML"),
            ("algin.method=none", "algin: unknown key; did you mean 'align'?"),
        ],
    )
    def test_an_override_that_cannot_be_is_refused(self, override, message):
        assert message in problems_of(PAIR, [override])


class TestProblems:
    def test_all_are_told_at_once_with_their_paths(self):
        message = problems_of(
            {
                "models": [
                    {"modle": "a"},
                    {"model": "b", "parameters": {"weight": "heavy", "density": 0.5}},
                    {"model": "c", "parameters": {"weight": [{"filter": 3, "value": 1}, {"value": None}]}},
                    "d",
                ],
                "merge_method": "tis",
                "dtype": "bfloat",
                "slices": [],
                "tokenizer": {"sorce": "union"},
                "parameters": {"int8_mask": True, "normalise": True, "weight": "light"},
                "align": {
                    "metod": "none",
                    "max_sweeps": True,
                    "calibration": {"tsk": "x"},
                },
                "diagnose": {"task": "classify", "dataset": "d", "samples": "many", "alphas": 1, "layers": [True]},
                "publish": {"private": "no", "licens": "mit"},
                "overwrite": "yes",
                "max_shard_size": "5 potatoes",
                "seed": -0.5,
            }
        )
        for expected in (
            "models.0.modle: unknown key; did you mean 'model'?",
            "models.0.model: missing",
            "models.1.parameters.weight: a finite number, a list of numbers or of filter/value pairs is expected",
            "models.1.parameters.density: unknown key (linear has weight; density is one of ",
            "models.2.parameters.weight.0.filter: text is expected, found 3",
            "models.2.parameters.weight.1.value: a finite number or a list of numbers is expected, found None",
            "models.3: `model: …` is expected, found 'd'",
            "merge_method: unknown 'tis'; did you mean 'ties'?",
            "dtype: unknown 'bfloat'; did you mean 'bfloat16'?",
            "slices: stands beside `models`; a recipe has one of them",
            "tokenizer.sorce: unknown key; did you mean 'source'?",
            "parameters.normalise: unknown key; did you mean 'normalize'?",
            "parameters.weight: a finite number, a list of numbers or of filter/value pairs is expected, found 'light'",
            "align.metod: unknown key; did you mean 'method'?",
            "align.max_sweeps: a whole number is expected, found True",
            "align.calibration.tsk: unknown key; did you mean 'task'?",
            "align.calibration.task: missing",
            "align.calibration.dataset: missing",
            "diagnose.samples: a whole number or nothing is expected, found 'many'",
            "diagnose.task: unknown 'classify'",
            "diagnose.alphas: a number of at least 3 or a list of values from 0 to 1 is expected, found 1",
            "diagnose.layers: a list of text is expected, found [True]",
            "publish.private: true or false or nothing is expected, found 'no'",
            "publish.licens: unknown key; did you mean 'license'?",
            "publish.repo_id: missing",
            "overwrite: true or false is expected, found 'yes'",
            "max_shard_size: bytes, or a size such as 5GB or 500MiB, is expected, found '5 potatoes'",
            "seed: a whole number is expected, found -0.5",
            "output_dir: missing",
        ):
            assert expected in message

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"output_dir": "o"}, "models: a list of at least one"),
            (changed(models=[]), "models: a list of at least one"),
            (changed(align={"method": "git_rebasin"}), "align.method: unknown 'git_rebasin'"),
            (changed(align={"restarts": 0}), "align.restarts: at least 1 is expected, found 0"),
            (changed(align={"anchors": 0}), "align.anchors: a number above 0 is expected, found 0"),
            (
                changed(align={"method": "activation_matching", "anchors": 4}),
                "align.anchors: has no meaning for the method activation_matching",
            ),
            (
                changed(align={"method": "activation_matching", "calibration": {**DATA, "samples": 0}}),
                "the recipe cannot be run: align.calibration.samples: at least 1 is expected, found 0",
            ),
            (changed(align={"start": "random"}), "align.start: unknown 'random'"),
            (changed(align={"solver": "exakt"}), "align.solver: unknown 'exakt'; did you mean 'exact'"),
            (changed(align="weight_matching"), "align: a mapping of keys is expected, found 'weight_matching'"),
            (changed(align={"reference": 2}), "align.reference: there is no model 2"),
            (changed(align={"reference": "org/B"}), "align.reference: 'org/B' is not one of the models"),
            (changed(align={"method": "activation_matching"}), "align.calibration: activation matching needs"),
            (changed(align={"start": "activation_matching"}), "align.calibration: activation matching needs"),
            (
                changed(base_model="org/base"),
                "base_model: linear has no base and merges it as one more model, which has no weight",
            ),
            (changed(parameters={"lambda": 0.5}), "parameters.lambda: has no meaning for a linear merge"),
            (changed(merge_method="task_arithmetic"), "base_model: task_arithmetic needs one"),
            (changed(tokenizer_source="base"), "tokenizer_source: `base` needs a base_model"),
            (changed(models=[PAIR["models"][0], {"model": "org/b"}]), "models.1: parameters.weight is missing"),
            (
                changed(models=[{"model": f"org/{n}", "parameters": {"weight": n}} for n in (1, -1)]),
                "models: the weights 1 + -1 sum to 0",
            ),
            (changed(diagnose={**DATA, "image_column": "img"}), "diagnose.image_column: has no meaning"),
            (changed(diagnose={**DATA, "batch_norm": {"smaples": 2}}), "diagnose.batch_norm.smaples: unknown key"),
            (changed(diagnose={**DATA, "alphas": [0, 1.5]}), "diagnose.alphas"),
            (changed(parameters={"lambda": float("nan")}), "parameters.lambda: a finite number is expected"),
        ],
    )
    def test_what_cannot_be_run_is_refused(self, content, message):
        assert message in problems_of(content)

    @pytest.mark.parametrize(
        ("weights", "parameters", "effective"),
        [
            ((1.0, 0.3, 0.7), {}, (0.5, 0.15, 0.35)),
            ((2, 3), {"normalize": False}, (2, 3)),
            ((0.25, [{"value": 0.75}]), {}, (0.25, 0.75)),
            (([0, 1], 1), {}, None),
            (([{"filter": "mlp", "value": 1}, {"value": 0.5}], 1), {}, None),
        ],
    )
    def test_weights_of_a_linear_merge_are_divided_by_their_sum(self, weights, parameters, effective):
        models = [{"model": f"m{i}", "parameters": {"weight": weight}} for i, weight in enumerate(weights)]
        recipe = load_recipe({"models": models, "parameters": parameters, "output_dir": "o"})
        assert recipe.weights == (effective and pytest.approx(effective))


class TestFiles:
    def read(self, tmp_path, text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("models: [", "not valid YAML at line 1, column 10: expected the node content"),
            ("a: 1\nmodels: []\na: 2\n", "line 1: the key 'a' comes twice"),
            ("align: {method: none, method: none}", "the key 'method' comes twice"),
            ("- a\n- b\n", "a recipe is a mapping of keys that begins with `models:`, found a list"),
            ("", "a recipe is a mapping of keys that begins with `models:`, found an empty file"),
            ("just words", "found 'just words'"),
            ("a: &x [*x]\n", "line 1: an alias stands within what it stands for"),
            ("a: &x {b: 1}\nc: {<<: *x, <<: *x}\n", "line 2: the key '<<' comes twice"),
            ("a: &x {b: 1, b: 2}\nc: {<<: *x}\n", "line 1: the key 'b' comes twice"),
            ("a: {<<: 3}", "line 1: `<<` takes over a mapping (`<<: *name`), or a list of them"),
            ("a: *x", "not valid YAML at line 1, column 4: found undefined alias 'x'"),
            (
                "a0: &a0 [laugh]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(15)),
                "larger than 1000000 characters with its aliases (`*name`) replaced",
            ),
            (
                f"a: &a {'x' * 1000}\nb: &b [{'*a, ' * 100}]\nc: [{'*b, ' * 100}]",
                "larger than 1000000 characters with its aliases",
            ),
            (
                "a0: &a0 [deep]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(30)),
                "nested deeper than 20 levels with its aliases (`*name`) replaced",
            ),
            ("a: " + "[" * 50 + "]" * 50, "nested deeper than 20 levels"),
            ("a: !!python/object/apply:os.system [ls]", "not valid YAML at line 1, column 4"),
            ("a: \x01", "not valid YAML: "),
            ("models: [{model: a}, {model: b}]\noutput_dir: ''", "output_dir: missing"),
            ("{[1, 2]: 3}", "a key must be a word"),
            (b"\xff\xfe\x00", "not a text file"),
            ("# " + "x" * 1_000_001, "this is no recipe"),
            ("a: 2024-13-45", "a value cannot be read"),
        ],
    )
    def test_files_that_are_no_recipes(self, tmp_path, text, message):
        assert message in self.read(tmp_path, text)

    def test_a_file_that_does_not_exist(self, tmp_path):
        with pytest.raises(RecipeError, match="No such file"):
            load_recipe(tmp_path / "none.yaml")
        with pytest.raises(RecipeError, match="Is a directory"):
            load_recipe(tmp_path)


def test_aliases_and_merge_keys_stand_for_what_they_name(tmp_path):
    """As `yaml.safe_load` reads them, which is what mergekit does."""
    texts = (
        "models:\n"
        "- {model: a, parameters: &shared {weight: [{filter: mlp, value: 0.3}, {value: 0.5}], density: 0.5}}\n"
        "- {model: b, parameters: *shared}\n"
        "- {model: c, parameters: {<<: *shared, density: 0.2}}\n"
        "merge_method: ties\nbase_model: d\noutput_dir: out\n",
        "- &a {x: 1, z: 0}\n- &b {x: 2, y: 3}\n- {<<: [*a, *b], z: 4}\n- {<<: *a, '<<': 5}\n- {<<: [*b, *a]}\n",
    )
    for text in texts:
        assert parse_yaml(text, "text", RecipeError) == yaml.safe_load(text)
    spelled_out = tmp_path / "spelled_out.yaml"
    spelled_out.write_text(json.dumps(yaml.safe_load(texts[0])))
    (tmp_path / "recipe.yaml").write_text(texts[0])
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(spelled_out)
    first, second, _ = (entry["parameters"] for entry in parse_yaml(texts[0], "text", RecipeError)["models"])
    assert first == second and first is not second and first["weight"] is not second["weight"]


def test_every_field_says_what_it_is():
    for kind in (Recipe, AlignSection, DiagnoseSection, BatchNormSection):
        for field in dataclasses.fields(kind):
            assert f"{field.name}:" in kind.__doc__


def test_reading_recipes_is_light():
    """No framework is imported to read a recipe."""
    code = (
        "import sys, hf_llfc.recipe;"
        "print(*sorted({'torch', 'transformers', 'datasets', 'numpy', 'evaluate', 'accelerate'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
