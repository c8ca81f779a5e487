"""What lies beside the weights: the same whatever else a run does, carried over or named, and told to others."""

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GenerationConfig, MixtralForCausalLM

import hf_llfc
from hf_llfc.errors import CheckpointError, EvaluationError
from hf_llfc.pipeline.planning import plan
from hf_llfc.publishing.card.card import rename_card
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import WORDS, save_tokenizer
from tests.runs import byte_llama, moved, saved, text_data, text_recipe
from tests.tiny_models import tiny_config

# As an older transformers wrote it: names of its time, and values of generation that a strict check dislikes.
OLD = {
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
    "temperature": 0.9,
    "do_sample": False,
    "unsloth_version": "2024.8",
}
DATA = {"task": "text-generation", "tokenizer": "bytes", "max_length": 16, "batch_size": 4, "samples": 4}


def edit(path: Path, **changes) -> dict:
    """Changes keys of a JSON file; `...` removes one."""
    content = json.loads(path.read_text())
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(content))
    return content


def old(model, folder: Path) -> Path:
    """A model saved with the config of an older transformers, and a tokenizer."""
    saved(model, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / "config.json", dtype=..., rope_parameters=..., **OLD)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return old(byte_llama(0), tmp_path / "a"), old(moved(byte_llama(0), 1), tmp_path / "b")


def beside(folder: Path) -> dict[str, bytes]:
    """The files of a result but the weights and what is ours."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("README.md", "model.safetensors") and path.parent.name != "llfc"
    }


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# -- the config


def test_the_config_is_the_same_whatever_else_a_recipe_has(pair, tmp_path):
    data = {**DATA, "dataset": str(text_data(tmp_path))}
    sections = {
        "plain": {},
        "diagnosed": {"diagnose": {**data, "alphas": 3}},
        "matched": {"align": {"method": "weight_matching"}},
        "by_data": {"align": {"method": "activation_matching", "calibration": data}},
        "kept": {"diagnose": {**data, "alphas": 3}, "keep_where_broken": {"model": 0}},
        "karcher": {"merge_method": "karcher"},
    }
    for name, section in sections.items():
        align = section.pop("align", "none")
        method = section.pop("merge_method", "linear")
        hf_llfc.merge(pair, out=tmp_path / name, align=align, merge_method=method, **section)
        assert beside(tmp_path / name) == beside(tmp_path / "plain"), name
    assert config(tmp_path / "plain") == config(pair[0])
    assert beside(tmp_path / "plain").keys() == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_union_changes_the_number_of_tokens_and_nothing_else(pair, tmp_path):
    for folder, more in zip(pair, (["x"], ["y", "z"]), strict=True):
        save_tokenizer(folder, [f"w{index}" for index in range(256 - 7 - len(more))] + WORDS + more)
    hf_llfc.merge(pair, out=tmp_path / "out", tokenizer_source="union")
    assert config(tmp_path / "out") == {**config(pair[0]), "vocab_size": 258}


def test_an_adapter_leaves_the_config_of_its_base(pair, tmp_path):
    base, other = pair
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(byte_llama(0), lora).save_pretrained(tmp_path / "lora")
    hf_llfc.merge([f"{base}+{tmp_path / 'lora'}", other], out=tmp_path / "out")
    assert config(tmp_path / "out") == config(base)


def test_an_alignment_over_all_groups_unties_the_head_and_changes_nothing_else(tmp_path):
    models = [old(byte_llama(seed, tie_word_embeddings=True), tmp_path / str(seed)) for seed in (0, 1)]
    align = {"method": "weight_matching", "groups": "full", "max_sweeps": 1, "restarts": 1}
    hf_llfc.merge(models, out=tmp_path / "out", align=align)
    assert config(tmp_path / "out") == {**config(models[0]), "tie_word_embeddings": False}


def test_experts_lie_in_the_same_shards_whatever_else_a_recipe_has(tmp_path):
    config_of = tiny_config("mixtral")
    config_of.vocab_size = 256
    models = [saved(MixtralForCausalLM(config_of), tmp_path / name) for name in "ab"]
    data = {**DATA, "dataset": str(text_data(tmp_path)), "labels": False, "alphas": 3}
    hf_llfc.merge(models, out=tmp_path / "plain", max_shard_size="20KB")
    hf_llfc.merge(models, out=tmp_path / "diagnosed", max_shard_size="20KB", diagnose=data)
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 2
    for path in (tmp_path / "plain").glob("model*"):
        assert path.read_bytes() == (tmp_path / "diagnosed" / path.name).read_bytes(), path.name


def test_keys_that_tell_of_a_parents_files_are_left_out(pair, tmp_path):
    (pair[0] / "model.safetensors").rename(pair[0] / "weights.safetensors")
    edit(pair[0] / "config.json", transformers_weights="weights.safetensors", _name_or_path="/home/ada/secret")
    hf_llfc.merge(pair, out=tmp_path / "out")
    assert not {"transformers_weights", "_name_or_path"} & config(tmp_path / "out").keys()
    hf_llfc.merge([tmp_path / "out", pair[1]], out=tmp_path / "again")


def test_the_config_names_the_dtype_of_most_weights(tmp_path):
    folders = []
    for seed in (0, 1):
        folder = saved(byte_llama(seed).to(torch.bfloat16), tmp_path / str(seed))
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["lm_head.weight"].float()  # it comes first by name
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    hf_llfc.merge(folders, out=tmp_path / "out")
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    edit(folders[0] / "config.json", vision_config={"torch_dtype": "bfloat16"})
    edit(folders[1] / "config.json", vision_config={"torch_dtype": "bfloat16"})
    hf_llfc.merge(folders, out=tmp_path / "wide", out_dtype="float32")
    assert config(tmp_path / "wide")["dtype"] == "float32"
    assert config(tmp_path / "wide")["vision_config"] == {"torch_dtype": "float32"}, "no weight has another"


# -- how it generates


def test_generation_values_that_a_strict_check_dislikes_are_kept(pair, tmp_path):
    hf_llfc.merge(pair, out=tmp_path / "out", tokenizer_source="union")
    assert config(tmp_path / "out")["temperature"] == 0.9 and config(tmp_path / "out")["do_sample"] is False


def test_a_model_in_memory_keeps_generation_values_that_a_strict_check_dislikes(tmp_path):
    models = [byte_llama(0), byte_llama(1)]
    models[0].generation_config = GenerationConfig(temperature=0.9, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        models[0].generation_config.save_pretrained(tmp_path)
    hf_llfc.merge(models, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_tokenizer_of_another_model_brings_neither_its_generation_nor_its_licence(pair, tmp_path):
    for folder, value in zip(pair, (0.3, 0.8), strict=True):
        (folder / "generation_config.json").write_text(json.dumps({"temperature": value, "do_sample": True}))
        (folder / "LICENSE").write_text(folder.name)
        edit(folder / "tokenizer_config.json", mine=folder.name)
    hf_llfc.merge(pair, out=tmp_path / "out", tokenizer_source=1)
    found = beside(tmp_path / "out")
    assert json.loads(found["generation_config.json"])["temperature"] == 0.3
    assert found["LICENSE"] == b"a" and json.loads(found["tokenizer_config.json"])["mine"] == "b"


def test_code_of_one_name_that_two_models_need_is_refused(pair, tmp_path):
    for folder in pair:
        (folder / "code.py").write_text(f"# {folder.name}")
        edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokens", None]})
    with pytest.raises(CheckpointError, match=r"need different code of the name code\.py"):
        hf_llfc.merge(pair, out=tmp_path / "out", tokenizer_source=1)
    (pair[0] / "code.py").write_text("# b")
    hf_llfc.merge(pair, out=tmp_path / "out", tokenizer_source=1)
    assert beside(tmp_path / "out")["code.py"] == b"# b"


# -- sentence-transformers


def sentences(folder: Path, seed: int, *, dense: float | None = 1.0, pooling: str = "cls", **options) -> Path:
    """A SentenceTransformer: a BERT, a pooling, and a dense layer with weights of its own."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    saved(BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **sizes)), folder)
    save_tokenizer(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({} if dense is None else {"2_Dense": "Dense"})
    rows = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}_token": True}))
    if dense is not None:
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 16, "out_features": 4}))
        save_file({"linear.weight": torch.full((4, 16), dense)}, folder / "2_Dense" / "model.safetensors", **options)
    return folder


OF_SENTENCES = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
MODULES = OF_SENTENCES | {"1_Pooling/config.json", "2_Dense/config.json"}


def test_modules_are_carried_over_and_their_weights_summed_as_the_models_are(tmp_path):
    pair = sentences(tmp_path / "a", 0), sentences(tmp_path / "b", 1, dense=3.0)
    result = hf_llfc.merge(pair, [0.25, 0.75], out=tmp_path / "out")
    found = beside(tmp_path / "out")
    assert all(found[name] == (pair[0] / name).read_bytes() for name in MODULES)
    weights = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert torch.equal(weights["linear.weight"], torch.full((4, 16), 2.5))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "SentenceTransformer(" in card
    assert not any("modules.json" in warning for warning in result.warnings)
    listed = json.loads((tmp_path / "out" / "llfc" / "files.json").read_text())["files"]
    assert "2_Dense/model.safetensors" in listed


def test_task_vectors_of_modules_are_added_to_those_of_the_base(tmp_path):
    base, a = sentences(tmp_path / "base", 0), sentences(tmp_path / "a", 1, dense=3.0)
    hf_llfc.merge([a], [0.5], out=tmp_path / "out", merge_method="task_arithmetic", base_model=base)
    weights = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert torch.equal(weights["linear.weight"], torch.full((4, 16), 2.0))


@pytest.mark.parametrize("settings", [{"align": "weight_matching"}, {"merge_method": "karcher"}], ids=str)
def test_modules_whose_weights_cannot_be_merged_stay_behind_and_are_named(settings, tmp_path, caplog):
    pair = sentences(tmp_path / "a", 0), sentences(tmp_path / "b", 1, dense=3.0)
    result = hf_llfc.merge(pair, out=tmp_path / "out", **settings)
    assert not beside(tmp_path / "out").keys() & MODULES
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "modules.json" in card
    assert any("modules.json" in warning for warning in result.warnings) and "modules.json" in caplog.text


def test_modules_of_equal_weights_go_along_whatever_the_method(tmp_path):
    pair = sentences(tmp_path / "a", 0), sentences(tmp_path / "b", 1)
    hf_llfc.merge(pair, out=tmp_path / "out", merge_method="karcher")
    assert beside(tmp_path / "out").keys() >= MODULES | {"2_Dense/config.json"}
    original, merged = (folder / "2_Dense" / "model.safetensors" for folder in (pair[0], tmp_path / "out"))
    assert merged.read_bytes() == original.read_bytes()


def test_a_module_that_is_not_finite_is_refused_before_the_weights_are_written(tmp_path):
    pair = sentences(tmp_path / "a", 0), sentences(tmp_path / "b", 1, dense=float("nan"))
    with pytest.raises(CheckpointError, match=r"linear\.weight of .*b: 64 of 64 elements are NaN"):
        hf_llfc.merge(pair, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


# -- what stays behind


def test_what_stays_behind_is_named_in_plan_record_and_card(pair, tmp_path):
    for name in ("training_args.bin", "notes.txt", "tf_model.h5", ".gitattributes"):
        (pair[0] / name).write_text("x")
    (pair[0] / "checkpoint-500").mkdir()
    for name in ("optimizer.pt", "model.safetensors"):
        (pair[0] / "checkpoint-500" / name).write_text("x")
    names = ["notes.txt", "tf_model.h5", "training_args.bin", "checkpoint-500/"]
    recipe = {"models": [{"model": str(each)} for each in pair], "output_dir": str(tmp_path / "out")}
    steps = {step["step"]: step["what"] for step in plan(load_recipe(recipe))["steps"]}
    assert all(name in steps["carry over"] for name in names)
    hf_llfc.run(recipe)
    assert beside(tmp_path / "out").keys() == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "llfc" / "run.json").read_text())["left"] == names
    assert all(name.replace("_", r"\_") in (tmp_path / "out" / "README.md").read_text() for name in names)


def test_an_error_after_the_weights_keeps_them_and_says_where(pair, tmp_path, monkeypatch):
    data = {**DATA, "dataset": str(text_data(tmp_path)), "alphas": 3}

    def fail(*_, **__):
        raise EvaluationError("the data end here")

    with monkeypatch.context() as patch:
        patch.setattr("hf_llfc.pipeline.stages.evaluate_parents", fail)
        with pytest.raises(EvaluationError, match="the data end here\nThe weights are complete, and kept in") as error:
            hf_llfc.merge(pair, out=tmp_path / "out", diagnose=data)
    kept = tmp_path / ".out.partial" / "output"
    assert str(kept) in str(error.value) and not (tmp_path / "out").exists()
    weights = (kept / "model.safetensors").stat().st_ino
    hf_llfc.merge(pair, out=tmp_path / "out", diagnose=data)
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == weights, "they were not made again"
    assert (tmp_path / "out" / "README.md").is_file() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("align", ["none", "weight_matching"])
def test_what_follows_the_weights_may_be_set_right(pair, tmp_path, monkeypatch, caplog, align):
    (tmp_path / "short.txt").write_text("a line of text that is too short for what was asked of it, or not")
    wrong = {**DATA, "dataset": str(tmp_path / "short.txt"), "alphas": 3, "samples": 1}

    def fail(*_, **__):
        raise EvaluationError("the data end here")

    with monkeypatch.context() as patch:
        patch.setattr("hf_llfc.pipeline.stages.evaluate_parents", fail)
        with pytest.raises(EvaluationError, match="also with other data or another target"):
            hf_llfc.merge(pair, out=tmp_path / "out", align=align, diagnose=wrong)
    kept = tmp_path / ".out.partial" / "output"
    weights = (kept / "model.safetensors").stat()
    right = {**DATA, "dataset": str(text_data(tmp_path)), "alphas": 5}
    for changed in ({"out_dtype": "bfloat16"}, {"weights": [0.3, 0.7]}):
        with pytest.raises(CheckpointError, match="holds an interrupted run of something else"):
            hf_llfc.merge(pair, out=tmp_path / "out", **{"align": align, "diagnose": right, **changed})
    result = hf_llfc.merge(pair, out=tmp_path / "out", align=align, diagnose=right)
    assert "the weights are those of a run that differs in what follows them" in caplog.text
    found = (tmp_path / "out" / "model.safetensors").stat()
    assert (found.st_ino, found.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns), "they were not made again"
    assert len(result.report.path) == 5 and result.report.data["dataset"].endswith("text.txt")
    hf_llfc.merge(pair, out=tmp_path / "anew", align=align, diagnose=right)
    names = {path.relative_to(tmp_path / "anew") for path in (tmp_path / "anew").rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name in ("model.safetensors", "config.json", "llfc/llfc_report.json"):
        assert (tmp_path / "anew" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_weights_that_depend_on_what_is_measured_are_not_taken_for_others(pair, tmp_path, monkeypatch):
    data = {**DATA, "dataset": str(text_data(tmp_path)), "alphas": 3}
    recipe = text_recipe(*pair, Path(data["dataset"]), tmp_path / "out", keep_where_broken={"model": 0, "ratio": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr("hf_llfc.pipeline.stages.evaluate_parents", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hf_llfc.run(recipe)
    recipe["diagnose"]["max_length"] = 16
    with pytest.raises(CheckpointError, match="holds an interrupted run of something else"):
        hf_llfc.run(recipe)


# -- how inputs are prepared


def test_parents_that_prepare_inputs_differently_are_named_everywhere(pair, tmp_path, caplog):
    content = json.loads((pair[1] / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (pair[1] / "tokenizer.json").write_text(json.dumps(content))
    (pair[0] / "chat_template.jinja").write_text("{{ messages }}")
    for folder, mean in zip(pair, ([0.5] * 3, [0.485, 0.456, 0.406]), strict=True):
        processor = {"image_mean": mean, "size": {"height": 8}, "image_processor_type": f"Of{folder.name}"}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    result = hf_llfc.merge(pair, out=tmp_path / "out")
    wanted = [
        'normalizer in tokenizer.json is {"type": "Lowercase"}, but that of',
        "image_mean in preprocessor_config.json is [0.485, 0.456, 0.406], but that of",
        "chat template is none, but that of",
    ]
    assert sum("inputs are prepared as" in each for each in result.warnings) == 3
    assert result.to_dict()["warnings"] == result.warnings
    checked = hf_llfc.check(*pair, level=0)
    recorded = json.loads((tmp_path / "out" / "llfc" / "run.json").read_text())["warnings"]
    for words in wanted:
        for places in (result.warnings, checked.differences, recorded, [caplog.text]):
            assert any(words in each for each in places), (words, places)
    assert str(tmp_path) not in "".join(recorded), "others need not know where files lie"
    assert r"image\_mean in preprocessor\_config.json" in (tmp_path / "out" / "README.md").read_text()
    assert checked.answer == "undecided", "no reason not to merge"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True}, None),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": False}, "pooling_mode_cls_token in 1_Pooling/config.json"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case in sentence_bert_config.json is true"),
        ("config_sentence_transformers.json", {"prompts": {"query": "q: "}}, "prompts.query in config_sentence"),
        ("tokenizer_config.json", {"do_lower_case": True, "model_max_length": 4}, None),
        ("tokenizer_config.json", {"chat_template": "{{ x }}"}, 'chat template is "{{ x }}", but that of'),
        ("config_sentence_transformers.json", {"__version__": {"torch": "9"}}, None),
    ],
    ids=str,
)
def test_what_changes_inputs_is_told_from_bookkeeping(name, change, words, tmp_path):
    pair = sentences(tmp_path / "a", 0), sentences(tmp_path / "b", 0)
    edit(pair[1] / name, **change)
    found = hf_llfc.check(*pair, level=0).differences
    assert [words in each for each in found] == ([] if words is None else [True]), found


# -- weights that are far apart


def test_models_that_are_far_apart_and_not_aligned_are_warned_of(tmp_path, caplog):
    pair = saved(byte_llama(0), tmp_path / "a"), saved(byte_llama(1), tmp_path / "b")
    result = hf_llfc.merge(pair, out=tmp_path / "out")
    (warning,) = result.warnings
    assert "are far apart" in warning and "the median cosine of 16 matrices is " in warning
    cosine = float(warning.partition("matrices is ")[2].split(",")[0])
    assert abs(cosine) < 0.05 and warning in caplog.text
    assert "are far apart" in (tmp_path / "out" / "README.md").read_text()
    assert (
        "./b and ./a are far apart" in json.loads((tmp_path / "out" / "llfc" / "run.json").read_text())["warnings"][0]
    )


def test_near_models_and_aligned_ones_are_not_warned_of(tmp_path):
    near = byte_llama(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.005 * torch.randn_like(parameter))
    a, b = saved(byte_llama(0), tmp_path / "a"), saved(near, tmp_path / "b")
    assert hf_llfc.merge([a, b], out=tmp_path / "near").warnings == []
    other = saved(byte_llama(1), tmp_path / "other")
    assert hf_llfc.merge([a, other], out=tmp_path / "aligned", align="weight_matching").warnings == []
    assert hf_llfc.merge([a], out=tmp_path / "alone").warnings == []


# -- what others are told


def test_no_absolute_path_is_told_to_others(pair, tmp_path):
    data = {**DATA, "dataset": str(text_data(tmp_path)), "alphas": 3}
    hf_llfc.merge(pair, out=tmp_path / "out", align="weight_matching", diagnose=data)
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
    recipe = yaml.safe_load((tmp_path / "out" / "llfc" / "recipe.yaml").read_text())
    assert [entry["model"] for entry in recipe["models"]] == ["../../a", "../../b"]
    assert recipe["diagnose"]["dataset"] == "../../text.txt"
    load_recipe(tmp_path / "out" / "llfc" / "recipe.yaml")


def test_a_card_of_models_in_memory_names_no_recipe_that_cannot_run(tmp_path):
    models = [byte_llama(0), byte_llama(1)]
    for model in models:
        model.name_or_path = "org/base"  # where the training began
    hf_llfc.merge(models, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It cannot be repeated" in card and "kept nowhere" in card
    assert "hf-llfc run" not in card and "huggingface.co/org/base" not in card and "base_model" not in card
    hf_llfc.publishing.write_card(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().splitlines()[10:] == card.splitlines()[10:]


def test_a_card_of_temporary_models_says_so(pair, tmp_path):
    hf_llfc.merge(pair, out=tmp_path / "out", temporary=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It cannot be repeated: a, b were in memory or in files that are gone" in card
    assert "hf-llfc run" not in card and "- model:" not in card


def test_a_card_written_again_is_a_run_s_and_what_a_user_wrote_in_it_is_not(pair, tmp_path):
    out = tmp_path / "out"
    hf_llfc.merge(pair, out=out)
    hf_llfc.publishing.write_card(out)
    assert rename_card(out, "ada/soup")
    hf_llfc.merge(pair, out=out, overwrite=True)
    card = out / "README.md"
    card.write_text(card.read_text() + "\nTrained for fun.\n")
    assert rename_card(out, "ada/stew") and "Trained for fun." in card.read_text()
    with pytest.raises(CheckpointError, match=r"the changes would be lost: README\.md; move them elsewhere"):
        hf_llfc.merge(pair, out=out, overwrite=True)
    assert "Trained for fun." in card.read_text()
