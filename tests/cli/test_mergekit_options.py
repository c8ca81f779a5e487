"""`hf-llfc run` answers to every option of `mergekit-yaml`, and the page about it says the same."""

import runpy
from pathlib import Path

import pytest

from hf_llfc.cli import main
from hf_llfc.cli.arguments import parse
from hf_llfc.cli.mergekit_options import ANSWERS, NOT_NEEDED, REFUSED, WORKS

ROOT = Path(__file__).parents[2]


def test_no_option_of_mergekit_is_without_an_answer():
    click = pytest.importorskip("click")
    options = pytest.importorskip("mergekit.options", reason="mergekit is not installed")
    command = click.command()(options.add_merge_options(lambda **_: None))
    flags = {flag for each in command.params for flag in each.opts}
    known = {*ANSWERS, "-j", "--device", "--quiet", "-v"}
    assert flags <= known


def test_what_works_becomes_words_of_ours():
    words = [
        "run",
        "--cuda",
        "--out-shard-size",
        "2B",
        "r.yml",
        "out",
        "--random-seed=7",
        "--trust-remote-code",
        "-j",
        "3",
    ]
    options = parse([*words, "--transformers-cache", "/cache", "seed=1"])
    assert options.recipe == "r.yml"
    expected = ["seed=1", 'output_dir="out"', "device=cuda", "max_shard_size=2000000000", "seed=7"]
    assert sorted(options.overrides) == sorted([*expected, "trust_remote_code=true"])
    assert options.environment == {"OMP_NUM_THREADS": "3", "HF_HUB_CACHE": "/cache"}
    assert "--cuda: as `--device cuda`" in options.notes
    assert parse(["run", "r.yml", "--out-shard-size", "500M"]).overrides == ["max_shard_size=500000000"]
    assert parse(["run", "r.yml", "--out-shard-size", "2GB"]).overrides == ["max_shard_size=2GB"]


@pytest.mark.parametrize("flag", [flag for flag, answer in ANSWERS.items() if answer.kind == NOT_NEEDED])
def test_what_is_not_needed_is_said_and_the_run_goes_on(flag):
    value = [ANSWERS[flag].value] if ANSWERS[flag].value else []
    options = parse(["run", flag, *value, "r.yml", "--no-cuda"])
    assert (options.recipe, options.overrides) == ("r.yml", [])
    assert options.notes == [f"{flag}: not needed, {ANSWERS[flag].words}", "--no-cuda: so it is without --cuda"]


@pytest.mark.parametrize("flag", [flag for flag, answer in ANSWERS.items() if answer.kind == REFUSED])
def test_what_cannot_be_is_refused_with_what_to_do(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["run", "r.yml", flag])
    assert stop.value.code == 2
    assert f"hf-llfc: error: {flag}: {ANSWERS[flag].words}" in capsys.readouterr().err


def test_a_value_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(["run", "r.yml", "--random-seed", "--cuda"])
    assert "--random-seed: needs a value, N" in capsys.readouterr().err


def test_other_commands_name_the_option_of_ours(capsys):
    with pytest.raises(SystemExit):
        parse(["merge", "A", "B", "--out", "o", "--cuda"])
    assert "--cuda is mergekit's: `--device cuda`" in capsys.readouterr().err


def test_a_word_behind_the_recipe_is_the_folder_unless_it_is_a_key(tmp_path, capsys):
    assert parse(["run", "r.yml", "a=1", "merged"]).overrides == ["a=1", 'output_dir="merged"']
    (tmp_path / "r.yml").write_text("models: [{model: a}]")
    assert main(["run", str(tmp_path / "r.yml"), "overwrite"]) == 2
    assert "override 'overwrite': write key.sub=value" in capsys.readouterr().err


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "mergekit.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "options.py"))["mergekit_written"](page) == page
    assert all(answer.kind in (WORKS, NOT_NEEDED, REFUSED) and f"`{flag}" in page for flag, answer in ANSWERS.items())
