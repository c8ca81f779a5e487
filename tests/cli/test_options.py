"""Every option is described once, and is where it is to be: in recipes, on the command line and in Python."""

import argparse
import dataclasses
import inspect
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_llfc
from hf_llfc.cli.arguments import COMMANDS, LEFT_OUT, NAMES, OF_A_RUN, parse
from hf_llfc.errors import LLFCError
from hf_llfc.recipe import load_recipe, sections, slices
from hf_llfc.recipe.data import EvaluationConfig
from hf_llfc.recipe.options import options_of
from tests.runs import byte_llama, saved, text_data

ROOT = Path(__file__).parents[2]

SECTIONS = (
    sections.Recipe,
    sections.ModelEntry,
    sections.MergeParameters,
    sections.AlignSection,
    sections.CalibrateSection,
    sections.DiagnoseSection,
    sections.BatchNormSection,
    sections.KeepSection,
    sections.PublishSection,
    slices.SliceSection,
    slices.SourceSection,
    slices.ModuleSection,
    sections.TokenizerSection,
    sections.TokenRule,
    sections.TokenSource,
    EvaluationConfig,
)

# Command → the sections that it makes.
USED = {
    "check": [EvaluationConfig],
    "align": [sections.AlignSection, EvaluationConfig],
    "merge": [sections.Recipe, sections.AlignSection, EvaluationConfig],
    "diagnose": [sections.DiagnoseSection, sections.AlignSection, EvaluationConfig],
    "push": [sections.PublishSection],
}

# Python function → its section, and the options that it has no keyword for, with the reason.
KEYWORDS = [
    (
        hf_llfc.align,
        sections.AlignSection,
        {
            "reference": "is `to`",
            "together": "two models are aligned to each other",
            "label_order": "transforms change no answer",
        },
    ),
    (
        hf_llfc.diagnose,
        sections.DiagnoseSection,
        {"batch_norm": "running statistics are measured anew on the data themselves"},
    ),
    (hf_llfc.publish, sections.PublishSection, {"license": "the card that states it is written by then"}),
]

FIRST = {
    "check": ["A", "B"],
    "align": ["B", "--to", "A", "--out", "o"],
    "merge": ["A", "B", "--out", "o"],
    "diagnose": ["A", "B"],
    "extract": ["A", "B", "--out", "o"],
    "push": ["o", "me/o"],
    "run": ["recipe.yaml"],
    "inspect": ["A"],
    "demo": [],
    "register-extension": [],
}


def shown(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_field_is_described(kind):
    options = options_of(kind)
    fields = {field.name: field.metadata for field in dataclasses.fields(kind)}
    assert list(options) == [name for name, said in fields.items() if "help" not in said]  # the others nobody writes
    for name, each in options.items():
        assert each.help.endswith(".") and each.help[0].isupper()
        assert f"{name}: {each.help}" in kind.__doc__


@pytest.mark.parametrize(("command", "kind"), [(command, kind) for command in USED for kind in USED[command]])
def test_the_command_line_has_every_option(command, kind, capsys):
    text = shown(command, capsys)
    left_out = LEFT_OUT.get((command, kind.__name__), {})
    assert all(left_out.values()) and left_out.keys() <= options_of(kind).keys()
    for name, each in options_of(kind).items():
        flag = f"--{NAMES.get(name, name).replace('_', '-')}"
        flag = "--align" if kind is sections.AlignSection and name == "method" and command != "align" else flag
        is_shown = f" {flag} " in text or f" {flag}\n" in text or f" {flag}, " in text
        # `--align` of a command is the method of the section that is left out, `--calibrate` asks for one,
        # `--tokenizer` is that of the data.
        is_other = kind is sections.Recipe and flag in ("--align", "--calibrate", "--tokenizer")
        assert is_shown != (name in left_out) or is_other, (flag, each.help)


@pytest.mark.parametrize(("function", "kind", "left_out"), KEYWORDS, ids=lambda value: getattr(value, "__name__", ""))
def test_python_has_every_option_with_its_default(function, kind, left_out):
    parameters = inspect.signature(function).parameters
    for name, each in options_of(kind).items():
        assert (name in parameters) != (name in left_out), name
        if name in parameters and not each.is_required and each.reads is None:
            assert parameters[name].default == each.default, name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_groups_and_an_example_that_parses(command, capsys):
    text = shown(command, capsys)
    assert text.startswith(f"usage: hf-llfc {command}") and "\nmessages:\n" in text
    example = text.split("example:\n")[1].split()
    assert example[0] == "hf-llfc" and parse(example[1:]).command == command


def test_help_shows_defaults(capsys):
    text = " ".join(shown("merge", capsys).split())
    for default in (
        "(default: 50)",
        "(default: exact)",
        "(default: 5GB)",
        "(default: 16 with the groups full, else 1)",
    ):
        assert default in text


@pytest.mark.parametrize("command", FIRST)
def test_what_is_not_given_is_none(command):
    """So that nothing a user wrote is ignored, also where it is the default."""
    options = vars(parse([command, *FIRST[command]]))
    assert {options[name] for name in ("anchors", "restarts", "samples") if name in options} <= {None}


@pytest.mark.parametrize("words", [["--weights", "0.25,0.75"], ["--weights", "0.25", "0.75"]], ids=str)
def test_numbers_are_separated_by_commas_or_blanks(words):
    assert parse(["merge", "A", "B", "-o", "out", *words]).weights == [0.25, 0.75]


def test_lists_are_read_in_any_place():
    words = ["diagnose", "--alphas", "0,0.5,1", "--metric", "f1,mcc", "--label-map", "no=0,yes=good", "A", "B"]
    options = parse(words)
    assert (options.alphas, options.metric, options.models) == ([0, 0.5, 1], ["f1", "mcc"], ["A", "B"])
    assert options.label_map == {"no": 0, "yes": "good"}


def test_options_of_a_run_win_over_its_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("models: [{model: a}]\noutput_dir: there\n")
    for flag in ("--out", "-o"):
        options = parse(["run", str(recipe), "seed=3", flag, "he re: #1", "--overwrite", "--device", "cpu"])
        read = load_recipe(options.recipe, options.overrides)
        assert (read.output_dir, read.overwrite, read.device, read.seed) == ("he re: #1", True, "cpu", 3)
    assert load_recipe(recipe).output_dir == "there" and set(OF_A_RUN) <= options_of(sections.Recipe).keys()


def test_the_page_of_the_recipe_is_up_to_date():
    generator = runpy.run_path(str(ROOT / "docs" / "options.py"))
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert generator["written"](page) == page, "run `python docs/options.py`"
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert generator["methods_written"](methods) == methods, "run `python docs/options.py`"
    shown = {kind for _, kind, _ in generator["MARKED"].findall(page)}
    assert shown == {kind.__name__ for kind in SECTIONS}


def test_an_older_name_is_read():
    content = {"models": [{"model": "a"}], "output_dir": "o", "publish": {"repo_id": "me/o", "licence": "mit"}}
    recipe = load_recipe(content)
    assert recipe.publish.license == "mit" and recipe.to_dict()["publish"]["license"] == "mit"


WRONG = {
    "a word": (sections.AlignSection, {"method": "git"}, "method: unknown 'git'"),
    "a range": (sections.AlignSection, {"max_sweeps": 0}, "max_sweeps: at least 1 is expected, found 0"),
    "a type": (sections.AlignSection, {"axes": 3}, "axes: a list of text is expected, found 3"),
    "no data": (sections.AlignSection, {"start": "activation_matching"}, "calibration: activation matching needs"),
    "two": (sections.AlignSection, {"restarts": 0, "solver": "exakt"}, "2 problems"),
    "data": (sections.AlignSection, {"calibration": {"tsk": "x"}}, "calibration.tsk: unknown key; did you mean 'task'"),
    "points": (sections.DiagnoseSection, {"alphas": 2}, "alphas: a number of at least 3"),
    "a ratio": (sections.KeepSection, {"ratio": 0}, "ratio: a number above 0 is expected, found 0"),
    "a switch": (sections.BatchNormSection, {"recompute": "no"}, "recompute: true or false is expected, found 'no'"),
    "a place": (sections.PublishSection, {"repo_id": ["me"]}, "repo_id: text is expected"),
    "a recipe": (sections.Recipe, {"models": (), "output_dir": ""}, "output_dir: missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_section_judges_itself(case):
    kind, values, message = WRONG[case]
    if kind is sections.DiagnoseSection:
        values = {"data": EvaluationConfig("fill-mask", "d"), **values}
    with pytest.raises(LLFCError) as caught:
        kind(**values)
    assert message in str(caught.value)


def test_one_word_is_a_list_of_one():
    assert sections.AlignSection(exclude="residual").exclude == ("residual",)
    section = sections.DiagnoseSection({"task": "fill-mask", "dataset": "d"}, 3, measures="geometry")
    assert section.measures == ("geometry",) and section.alphas == (0.0, 0.5, 1.0)
    assert section.data == EvaluationConfig("fill-mask", "d")


FORMS = {
    "one model": (lambda: hf_llfc.merge("org/a", out="o"), "models: a list is expected, found 'org/a'"),
    "one weight": (lambda: hf_llfc.merge(["a"], 0.3, out="o"), "weights: a list is expected, found 0.3"),
    "weights twice": (lambda: hf_llfc.merge({"a": 1.0}, [1.0], out="o"), "weights: are given twice"),
    "no alignment": (lambda: hf_llfc.merge(["a"], out="o", align=3), "align: a mapping of keys is expected, found 3"),
    "no function": (lambda: hf_llfc.merge(["a"], out="o", progress=True), "progress: a function of"),
    "no metric": (
        lambda: hf_llfc.diagnose("a", "b", {"task": "fill-mask", "dataset": "d", "metric": object()}),
        "metric: text or a list of text or nothing is expected",
    ),
    "no data": (lambda: hf_llfc.check("a", "b", data="d"), "data: an EvaluationConfig or a mapping"),
    "no points": (
        lambda: hf_llfc.diagnose("a", "b", {"task": "fill-mask", "dataset": "d"}, alphas=2),
        "alphas: a number of at least 3",
    ),
    "one more": (
        lambda: hf_llfc.diagnose("a", "b", {"task": "fill-mask", "dataset": "d"}, more="c"),
        "more: a list is expected, found 'c'",
    ),
    "of all": (lambda: hf_llfc.align_all("ab"), "models: a list is expected, found 'ab'"),
}


@pytest.mark.parametrize("case", FORMS)
def test_python_takes_the_same_forms_everywhere(case):
    call, message = FORMS[case]
    with pytest.raises(LLFCError) as caught:
        call()
    assert message in str(caught.value)


def test_weights_stand_beside_their_models(tmp_path):
    a, b = (str(saved(byte_llama(seed), tmp_path / name)) for seed, name in enumerate("ab"))
    hf_llfc.merge({a: 0.9, b: 0.1}, out=tmp_path / "out")
    first, second, merged = (load_file(Path(each) / "model.safetensors") for each in (a, b, tmp_path / "out"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.9 * first[name] + 0.1 * second[name])
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "max_length": 32}
    report = hf_llfc.diagnose(a, b, data, alphas=3, layers="model.layers.0")
    assert [point.weights for point in report.path] == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert {row.layer for row in report.layers} == {"model.layers.0", "logits"}


def test_no_option_is_added_twice():
    parser = argparse.ArgumentParser(prog="hf-llfc merge")
    COMMANDS["merge"][0](parser)
    dests = [action.dest for action in parser._actions]
    assert len(dests) == len(set(dests))
