"""What the documents show is what the program does: their code runs, their commands parse or run, their recipes load.

Python and the commands of `hf-llfc` run in a folder with tiny models under the names that the page uses, one page after
another from top to bottom. What needs the Hub, a launcher, an optional package or an hour is parsed by its own parser
instead; `reason_not_to_run` says which.
"""

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_llfc.cli import main
from hf_llfc.cli.arguments import parse
from hf_llfc.recipe import load_recipe
from tests.docs_inputs import make_inputs
from tests.runs import byte_llama
from tests.trainer_script import Bytes

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Diagrams, tables as printed, patches, and what Sphinx reads.
SHOWN = {"text", "diff", "{toctree}", "{eval-rst}", "{include}"}
RECIPES_RUN = ("first_merge.md", "check.md", "weights.md", "independent.md", "calibration.md")
# Pages whose commands take more than some seconds: every measure of a diagnosis, each with its pictures.
SLOW = ("report.md",)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.findall(r"^```([^\n`]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, info.split(" ")[0], body) for info, body in found]


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a block as words, without comments and assignments before them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            yield [command[0].removeprefix(".venv/bin/"), *command[1:]]


def commands_in_tables(page: str) -> Iterator[list[str]]:
    """Commands of a launcher that a page shows in its tables or sentences."""
    stands_for = {"N": "2", "M": "2", "TOTAL": "4", "I": "1", "HOST": "localhost", "RUN": "1"}
    text = PAGES[page].read_text(encoding="utf-8")
    for line in re.findall(r"`((?:[A-Z_]+=\S+ )?(?:accelerate launch|torchrun) [^`]*-m hf_llfc[^`]*)`", text):
        line = re.sub(r"\[.*?\]", "", line)
        for command in commands_of(Block(page, "bash", line)):
            yield [stands_for.get(word, word) for word in command]


ALL = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [(block.page, command) for block in ALL if block.language == "bash" for command in commands_of(block)]
COMMANDS += [(page, command) for page in PAGES for command in commands_in_tables(page)]
WITH_CODE = sorted({block.page for block in ALL if block.language in ("python", "bash")} - {"CONTRIBUTING.md"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models and data, made once."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def reason_not_to_run(command: list[str]) -> str | None:
    """Why a command of hf-llfc is only parsed here."""
    name = command[1]
    if name in ("push", "register-extension"):
        return "changes the Hub or the user's home; tests/publishing and tests/cli/test_extension.py run it"
    if name == "demo":
        return "trains models for minutes; .ci/run runs it"
    if any(word.startswith(("ORG/", "NAMESPACE/")) for word in command):
        return "names models on the Hub"
    if any(word in ("RECIPE", "REPO_ID", "config.yml") for word in command):
        return "names no recipe"
    return None


def run_command(command: list[str]) -> None:
    """Runs a command of hf-llfc in the working directory; `check` may answer no."""
    if "image-classification" in command:  # the page calls them A and B whatever they are
        command = [f"IMAGES-{word}" if word in ("A", "B") else word for word in command]
    code = main([*command[1:], "--quiet"])
    assert code == 0 or (code == 1 and command[1] == "check"), shlex.join(command)


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in WITH_CODE])
def test_code_of_a_page_runs(page, inputs, tmp_path, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(inputs, work, symlinks=True)
    monkeypatch.chdir(work)
    names: dict[str, Any] = {"__name__": "page"}
    if page == "trainer.md":
        names |= {"model": byte_llama(0), "data": Bytes()}
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for block in blocks_of(page):
        if block.language == "python":
            exec(compile(block.text, f"{page}, python", "exec"), names)
        elif block.language == "yaml" and page in RECIPES_RUN:
            (work / "recipe.yaml").write_text(block.text)
            if page not in ("first_merge.md", "check.md"):  # which show the commands that take it
                assert main(["run", "recipe.yaml", "--quiet"]) == 0
        elif block.language == "bash":
            for command in commands_of(block):
                if command[0] == "hf-llfc" and reason_not_to_run(command) is None:
                    run_command(command)
    check_outcome(page, names)


def check_outcome(page: str, names: Mapping[str, Any]) -> None:
    """What the page promises of what its code made."""
    if page == "first_merge.md":
        assert names["result"].report.verdict.answer == "undecided"  # the models of the tests know nothing
        assert Path("report/llfc/report.html").is_file() and Path("merged_and_measured/README.md").is_file()
        assert len(names["result"].table) == 3
    if page == "weights.md":
        assert names["best"].loss == min(point.loss for point in names["report"].path)
    if page == "independent.md":
        assert Path("B-aligned/llfc/alignment.safetensors").is_file() and Path("b_to_a.safetensors").is_file()
        assert AutoModelForCausalLM.from_pretrained("merged_full").config.model_type == "llama"
    if page == "adapter.md":
        assert list(names["spec"].symmetric_axes) == ["neurons"]
        # A transform that moves nothing would show nothing.
        bias = names["model"].state_dict()["up.bias"]
        assert not torch.equal(names["alignment"].apply(names["model"].state_dict())["up.bias"], bias)
    if page == "trainer.md":
        assert AutoModelForCausalLM.from_pretrained("soup").num_parameters() == names["model"].num_parameters()
        assert Path("soup/README.md").is_file()


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_commands_are_what_their_programs_take(page, command):
    words = command[1:]
    if command[0] == "hf-llfc":
        assert parse(words).command == words[0]
    elif command[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        check_launched(launch_command_parser().parse_args(words[1:]).training_script_args, words)
    elif command[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        check_launched(get_args_parser().parse_args(words).training_script_args, words)
    elif command[:3] == ["python", "-m", "hf_llfc"] or command[:3] == ["python3", "-m", "venv"]:
        assert len(command) > 3
    elif command[0] in ("pip", "apt-get"):
        check_installed(words)
    elif "pytest" in command[:3]:
        check_markers(words)
    elif command[:3] == ["python", "-m", "sphinx"]:
        assert (ROOT / words[-2] / "conf.py").is_file() and "-W" in words
    elif command[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file()
    else:
        assert command[0] == "python", f"{page}: what is {command[0]}?"
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        options = [word.strip("[]") for word in words[1:] if word.strip("[]").startswith("--")]
        assert all(f'"{option}"' in source for option in options), f"{page}: {command}"


def check_launched(arguments: list[str], words: list[str]) -> None:
    """Behind a launcher a recipe stands where a command may."""
    assert words[words.index("-m") + 1] == "hf_llfc"
    assert parse(["run", *arguments]).recipe


def pyproject() -> dict[str, Any]:
    """The project's own description."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def check_installed(words: list[str]) -> None:
    """Extras and files that are installed from exist."""
    extras = pyproject()["project"]["optional-dependencies"]
    for word in words:
        assert all(extra in extras for extra in re.findall(r"\[(.*?)\]", word))
        assert not word.endswith(".txt") or (ROOT / word).is_file()


def check_markers(words: list[str]) -> None:
    """Markers are declared, folders are there."""
    markers = pyproject()["tool"]["pytest"]["ini_options"]["markers"]
    declared = {marker.split(":")[0] for marker in markers}
    for option, value in pairwise(words):
        if option == "-m" and value != "pytest":
            assert set(re.findall(r"\w+", value)) - {"and", "or", "not"} <= declared


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=lambda block: block.page)
def test_recipes_in_documents_load(block, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text)
    overrides = [] if "output_dir" in block.text else ["output_dir=merged"]  # given on the command line
    assert load_recipe(path, overrides).models


def test_every_block_is_of_a_kind_that_is_checked():
    assert {block.language for block in ALL} <= {"python", "bash", "yaml"} | SHOWN


def test_the_adapter_that_is_shown_is_the_one_that_is_there():
    (patch,) = (block.text for block in blocks_of("CONTRIBUTING.md") if block.language == "diff")
    shown = patch.split("+++ b/hf_llfc/adapters/families/modernbert.py\n")[1]
    lines = [line.removeprefix("+") for line in shown.splitlines()]
    assert (
        lines == (ROOT / "hf_llfc" / "adapters" / "families" / "modernbert.py").read_text(encoding="utf-8").splitlines()
    )


def test_links_lead_somewhere():
    for path in PAGES.values():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_model_types_are_counted_as_their_page_does():
    readme, adapter, page = (
        PAGES[name].read_text(encoding="utf-8") for name in ("README.md", "adapter.md", "model_types.md")
    )
    counted = dict(re.findall(r"^\| ([a-z][^|]*) \| (\d+) \|$", page, re.MULTILINE))
    sentence = (
        f"Of {counted['registered']} registered model types {counted['run under 5 M parameters']} run as tiny models; "
        f"{counted['verified']} of these have a verified spec"
    )
    assert sentence in " ".join(readme.split())
    assert f"| {counted['verified, hand-written']} model types" in adapter
