"""Files of strangers run no code, choose none, and cannot make a command build without end."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_llfc
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.bounds import refuse_more_modules_than_tensors
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, EvaluationError
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data
from tests.evaluation.tiny_data import pixel_rows, text_rows, word_tokenizer
from tests.runs import byte_llama, saved
from tests.tiny_models import tiny_model

# Modules that the commands import, of the standard library among them.
PLANTED = ("yaml", "filelock", "torch", "safetensors", "numpy", "json", "argparse", "rich", "transformers")
CODE = "open({!r}, 'a').write(__name__ + '\\n')\n"
TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast

class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""
METRIC_CODE = """
import datasets
import evaluate

class Strange(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"strange": 1.0}
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Exists as soon as a stranger's code has run."""
    return tmp_path / "ran"


# -- modules beside a checkpoint


@pytest.mark.parametrize(
    "start",
    [
        ["-m", "hf_llfc"],
        ["-c", "import sys; from hf_llfc.cli import main; sys.path.remove(''); sys.exit(main(sys.argv[1:]))"],
    ],
    ids=["module", "console script"],
)
def test_no_file_of_the_working_directory_is_imported(start, tmp_path, ran):
    folder = saved(byte_llama(0), tmp_path / "model")
    standard = ("json", "argparse") if start[0] == "-c" else ()  # Python itself has them before `-c` can tidy up
    for name in PLANTED:
        if name not in standard:
            (folder / f"{name}.py").write_text(CODE.format(str(ran)))
    root = str(Path(hf_llfc.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    command = [sys.executable, *start, "inspect", "."]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not ran.exists(), ran.read_text()


def test_modules_are_imported_by_name_and_files_by_path(tmp_path, monkeypatch, capsys, ran):
    monkeypatch.chdir(tmp_path)
    saved(byte_llama(0), tmp_path / "model")
    Path("own_adapter_file.py").write_text(CODE.format(str(ran)))
    path = list(sys.path)
    assert main(["inspect", "model", "--import", "own_adapter_file"]) == 2
    assert "the file is imported by --import own_adapter_file.py" in capsys.readouterr().err
    assert not ran.exists()
    assert main(["inspect", "model", "--import", "./own_adapter_file.py"]) == 0
    assert main(["inspect", "model", "--import", "own_adapter_file.py"]) == 0
    assert ran.read_text() == "own_adapter_file\n"  # once, however often it is named
    assert sys.path == path
    del sys.modules["own_adapter_file"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("absent.py", "No such file"), ("json.py", "another module is called 'json'"), (".relative", "relative import")],
)
def test_what_cannot_be_imported_is_one_error(name, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("json.py").write_text("")
    assert main(["inspect", "model", "--import", name]) == 2
    assert expected in capsys.readouterr().err


# -- tokenizers, processors, metrics


def with_code(folder: Path, ran: Path, file: str, auto_map: dict[str, object]) -> Path:
    """Adds code to the tokenizer or processor of a folder."""
    described = json.loads((folder / file).read_text())
    described.pop("tokenizer_class", None)
    described.pop("image_processor_type", None)
    (folder / file).write_text(json.dumps({**described, "auto_map": auto_map}))
    (folder / "strange_code.py").write_text(CODE.format(str(ran)) + TOKENIZER_CODE)
    return folder


@pytest.fixture
def coded_model(tmp_path: Path, ran: Path) -> Path:
    """A classifier whose tokenizer has code of its own."""
    model = tiny_model("bert", "sequence-classification")
    folder = saved(model, tmp_path / "coded")
    word_tokenizer().save_pretrained(folder)
    auto_map = {"AutoTokenizer": [None, "strange_code.StrangeTokenizer"]}
    return with_code(folder, ran, "tokenizer_config.json", auto_map)


def test_code_of_a_tokenizer_runs_only_if_its_model_is_trusted(coded_model, ran, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks for leave
    twin = shutil.copytree(coded_model, tmp_path / "twin")
    rows = tmp_path / "rows.parquet"
    text_rows().to_parquet(str(rows))
    recipe = {
        "models": [{"model": str(coded_model)}, {"model": str(twin)}],
        "align": {"method": "none"},
        "diagnose": {"task": "text-classification", "dataset": str(rows)},
        "output_dir": str(tmp_path / "out"),
    }
    try:
        hf_llfc.run(recipe)
    except EvaluationError as error:
        assert "trust_remote_code" in str(error)
    assert not ran.exists()
    recipe["models"][0]["trust_remote_code"] = True
    hf_llfc.run({**recipe, "output_dir": str(tmp_path / "trusted")})
    assert "strange_code" in ran.read_text()


def test_code_of_a_tokenizer_that_is_named_runs_only_if_the_data_are_trusted(coded_model, ran, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = tiny_model("bert", "sequence-classification").config
    settings = {"task": "text-classification", "dataset": text_rows(), "tokenizer": str(coded_model)}
    try:
        load_evaluation_data(EvaluationConfig(**settings), None, config, trust_remote_code=True)
    except EvaluationError as error:
        assert "trust_remote_code" in str(error)
    assert not ran.exists()
    load_evaluation_data(EvaluationConfig(**settings, trust_remote_code=True), None, config)
    assert ran.exists()


def test_code_of_an_image_processor_runs_only_if_trusted(tmp_path, ran, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = tiny_model("vit", "image-classification")
    folder = saved(model, tmp_path / "images")
    (folder / "preprocessor_config.json").write_text("{}")
    with_code(folder, ran, "preprocessor_config.json", {"AutoImageProcessor": "strange_code.StrangeTokenizer"})
    config = EvaluationConfig(task="image-classification", dataset=pixel_rows())
    with contextlib.suppress(EvaluationError):  # transformers may take the processor of the model type
        load_evaluation_data(config, folder, model.config)
    assert not ran.exists()
    with contextlib.suppress(EvaluationError):  # it is no processor
        load_evaluation_data(config, folder, model.config, trust_remote_code=True)
    assert ran.exists()


def test_a_metric_of_others_runs_only_if_trusted(tmp_path, ran, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil").mkdir()
    Path("evil/evil.py").write_text(CODE.format(str(ran)) + METRIC_CODE)
    config = tiny_model("bert", "sequence-classification").config
    settings = {"task": "text-classification", "dataset": text_rows(), "metric": "./evil"}
    with pytest.raises(EvaluationError, match=r"metric './evil' is not part of this package.*trust_remote_code: true"):
        load_evaluation_data(EvaluationConfig(**settings), word_tokenizer(), config)
    assert not ran.exists()
    data = load_evaluation_data(EvaluationConfig(**settings, trust_remote_code=True), word_tokenizer(), config)
    assert "./evil" in data.metrics and ran.exists()


# -- configs


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "_attn_implementation_internal"]
)
def test_configs_choose_no_implementation(key, tmp_path):
    folder = saved(byte_llama(0), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, key: "strangers/kernels"}))
    assert "strangers" not in str(vars(open_checkpoint(folder).config))
    merged = hf_llfc.merge([str(folder), str(folder)], out=tmp_path / "out")
    assert merged is not None


@pytest.mark.parametrize(
    ("family", "head", "changes", "expected"),
    [
        ("llama", "causal-lm", {"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000"),
        ("gpt2", "causal-lm", {"n_layer": 10**15}, "n_layer is 1000000000000000"),
        ("mixtral", "causal-lm", {"num_local_experts": 10**7}, "num_local_experts is 10000000"),
        ("resnet-basic", "image-classification", {"depths": [1, 10**9]}, "depths is 1000000000"),
        ("bert", "base", {"part_config": {"num_hidden_layers": 10**6}}, "part_config.num_hidden_layers is 1000000"),
    ],
)
@pytest.mark.timeout(20)
def test_a_config_describes_no_more_modules_than_there_are_tensors(family, head, changes, expected, tmp_path):
    folder = saved(tiny_model(family, head), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    for command in (lambda: hf_llfc.merge([folder, folder], out=tmp_path / "out"), lambda: hf_llfc.inspect(folder)):
        with pytest.raises(CheckpointError, match=rf"the files hold \d+ tensors, too few .*\n?.*{expected}"):
            command()


@pytest.mark.parametrize(
    ("values", "tensors"),
    [
        ({"num_hidden_layers": 1100}, 1200),
        ({"num_hidden_layers": 1024}, 3),  # layers may share their tensors, or be rows of one
        ({"head_dim": 4096, "vocab_size": 300_000, "layer_norm_eps": 1, "expert_parallel_size": 10**6}, 3),
        ({"use_layers": True, "num_hidden_layers": None, "layer_types": ["a", "b"]}, 3),
    ],
)
def test_sizes_and_counts_that_fit_are_accepted(values, tensors):
    refuse_more_modules_than_tensors("config.json", values, tensors)
