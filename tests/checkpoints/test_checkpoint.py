"""Opening checkpoints in folders and in memory: names, order, fingerprints, companions, and every refusal."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from hf_llfc.checkpoints import Checkpoint, open_checkpoint, state_dict_on_disk
from hf_llfc.errors import CheckpointError
from tests.tiny_models import TINY, tiny_config, tiny_model


def edit_config(folder: Path, **changes) -> None:
    """Sets keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    """Rewrites model.safetensors with what `change` makes of its tensors."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def rename(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def opened(folder: Path) -> Checkpoint:
    """A checkpoint that has been read, so that its files may change."""
    checkpoint = open_checkpoint(folder)
    checkpoint.fingerprint()
    return checkpoint


def refused(model, *expected: str, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model, **options)
    message = str(caught.value)
    for part in expected:
        assert part in message
    return message


# -- what is right


@pytest.mark.parametrize(("family", "head"), TINY)
def test_names_tensors_and_fingerprint_do_not_depend_on_how_the_model_was_saved(tmp_path, family, head):
    model = tiny_model(family, head)
    model.save_pretrained(tmp_path / "new")
    loaded = type(model).from_pretrained(tmp_path / "new")
    loaded.save_pretrained(tmp_path / "again", max_shard_size=20_000)
    loaded.save_pretrained(tmp_path / "memory-layout", save_original_format=False)
    sources = [tmp_path / "new", tmp_path / "again", str(tmp_path / "memory-layout"), model, loaded]
    checkpoints = [open_checkpoint(source) for source in sources]

    expected = load_file(tmp_path / "new" / "model.safetensors")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    for checkpoint in checkpoints:
        assert checkpoint.architecture == type(model).__name__
        assert checkpoint.model_class is type(model)
        assert checkpoint.unused == ()
        assert list(checkpoint.tensors) == list(checkpoints[0].tensors)
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in checkpoint.state_dict():
            assert torch.equal(tensor, expected[name])
            assert (tensor.dtype, tuple(tensor.shape)) == (
                checkpoint.tensors[name].dtype,
                checkpoint.tensors[name].shape,
            )
    assert len({checkpoint.fingerprint() for checkpoint in checkpoints}) == 1
    assert checkpoints[0].nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_the_fingerprint_changes_with_one_bit_one_name_or_one_dtype(save):
    original = open_checkpoint(save("a")).fingerprint()
    changed = save("b")

    def flip(tensors):
        tensors["classifier.bias"].view(torch.int32)[0] ^= 1
        return tensors

    edit_weights(changed, flip)
    assert open_checkpoint(changed).fingerprint() != original
    half = save("c")
    edit_weights(half, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    assert open_checkpoint(half).fingerprint() != original


def test_tensors_come_in_natural_order(tmp_path):
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=12, num_attention_heads=1, intermediate_size=4
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    names = [name for name in open_checkpoint(tmp_path).tensors if name.endswith("output.LayerNorm.bias")]
    layers = [int(name.split(".")[2]) for name in names]
    assert layers == sorted(layers) and layers[-1] == 11


def test_id_folder_revision_and_companions_of_a_folder(save):
    folder = save()
    for name in ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "other.safetensors", "run.py"):
        (folder / name).write_text("{}")
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.id, checkpoint.folder, checkpoint.revision) == (str(folder), folder, None)
    names = {path.name for path in checkpoint.companion_files}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    assert all(path.is_file() for path in checkpoint.companion_files)


def test_code_that_a_config_refers_to_is_a_companion(save):
    folder = save()
    (folder / "modeling_mine.py").write_text("raise RuntimeError('must not run')")
    edit_config(folder, auto_map={"AutoModel": "modeling_mine.Mine"})
    names = {path.name for path in open_checkpoint(folder).companion_files}
    assert "modeling_mine.py" in names


def test_a_model_in_memory_brings_the_companions_of_the_folder_it_came_from(save):
    folder = save()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    checkpoint = open_checkpoint(model)
    assert checkpoint.id == str(folder)
    assert {path.name for path in checkpoint.companion_files} >= {"tokenizer.json"}
    shutil.rmtree(folder)
    assert open_checkpoint(model).companion_files == ()
    fresh = open_checkpoint(tiny_model("bert", "base"))
    assert (fresh.id, fresh.companion_files, fresh.folder) == ("BertModel", (), None)
    assert fresh.config.architectures == ["BertModel"]


def test_opening_a_model_does_not_change_it(save):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(save())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    conversions, architectures = list(model._weight_conversions), model.config.architectures
    open_checkpoint(model).fingerprint()
    assert model._weight_conversions == conversions and model.config.architectures == architectures
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loaded_model_on_another_dtype_keeps_it():
    checkpoint = open_checkpoint(tiny_model("gpt2", "causal-lm", dtype=torch.bfloat16))
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}


def test_a_single_file_goes_before_an_index_as_in_transformers(save, tmp_path):
    folder = save("a", max_shard_size=20_000)
    expected = tiny_model("bert", "sequence-classification", seed=7)
    expected.save_pretrained(tmp_path / "single")
    os.rename(tmp_path / "single" / "model.safetensors", folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.fingerprint() == open_checkpoint(expected).fingerprint()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.classifier.weight, checkpoint.read("classifier.weight"))


def test_weights_that_the_config_names_are_the_ones_that_are_read(save):
    folder = save()
    os.rename(folder / "model.safetensors", folder / "mine.safetensors")
    edit_config(folder, transformers_weights="mine.safetensors")
    assert "classifier.weight" in open_checkpoint(folder).tensors
    edit_config(folder, transformers_weights="../a/mine.safetensors")
    refused(folder, "transformers_weights", "not a file of the checkpoint")
    edit_config(folder, transformers_weights=3)
    refused(folder, "transformers_weights", "not a file of the checkpoint")


def test_a_generation_config_in_an_old_config_is_kept(save):
    folder = save("a", "gpt2", "causal-lm")
    (folder / "generation_config.json").unlink()
    edit_config(folder, num_beams=4, max_length=50)
    generation = open_checkpoint(folder).generation_config
    assert generation is not None and (generation.num_beams, generation.max_length) == (4, 50)
    assert open_checkpoint(save("b")).generation_config is None


# -- names in older or other layouts


def test_gamma_and_beta_are_read_as_weight_and_bias(save):
    folder = save()
    expected = opened(folder)
    edit_weights(
        folder,
        rename(lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")),
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors == expected.tensors
    assert checkpoint.fingerprint() == expected.fingerprint()
    # A model loaded from such a file would be saved with the old names again; here it has one name everywhere.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert open_checkpoint(model).fingerprint() == expected.fingerprint()


def test_weight_norm_of_before_parametrizations_is_read(tmp_path):
    config = transformers.Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(4, 4),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=5,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    expected = opened(tmp_path)
    edit_weights(
        tmp_path,
        rename(
            lambda n: n.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            )
        ),
    )
    assert open_checkpoint(tmp_path).fingerprint() == expected.fingerprint()


def test_a_missing_head_prefix_is_added(save):
    folder = save("a", "gpt2", "causal-lm")
    expected = opened(folder)
    edit_weights(folder, rename(lambda name: name.removeprefix("transformer.")))
    assert open_checkpoint(folder).fingerprint() == expected.fingerprint()


def test_a_head_prefix_too_many_is_removed(save):
    folder = save("a", "bert", "base")
    expected = opened(folder)
    edit_weights(folder, rename(lambda name: f"bert.{name}"))
    assert open_checkpoint(folder).fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(("family", "head"), [("bert", "masked-lm"), ("gpt2", "causal-lm"), ("qwen3", "causal-lm")])
def test_a_tied_weight_may_be_there_twice_or_under_its_other_name(tmp_path, family, head):
    model = tiny_model(family, head)
    model.save_pretrained(tmp_path)
    expected = opened(tmp_path)
    target, source = next(iter(model.all_tied_weights_keys.items()))
    edit_weights(tmp_path, lambda tensors: tensors | {target: tensors[source].clone()})
    twice = open_checkpoint(tmp_path)
    assert twice.tensors == expected.tensors and twice.unused == ()
    assert twice.fingerprint() == expected.fingerprint()
    edit_weights(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != source})
    other = open_checkpoint(tmp_path)
    assert other.tensors == expected.tensors
    assert other.fingerprint() == expected.fingerprint()


def test_a_tied_weight_that_is_there_twice_and_differs_is_refused_when_it_is_read(save):
    folder = save("a", "gpt2", "causal-lm")
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight to transformer.wte.weight.*two different"):
        checkpoint.read("transformer.wte.weight")


def test_buffers_of_older_versions_are_left_out_in_silence(save, caplog):
    folder = save()
    expected = opened(folder)
    edit_weights(folder, lambda tensors: tensors | {"bert.embeddings.position_ids": torch.arange(37)[None]})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors == expected.tensors and checkpoint.unused == ()
    assert not caplog.records


def test_a_tensor_that_is_there_under_an_old_and_a_new_name_is_read_once_with_a_warning(save):
    folder = save()
    expected = opened(folder)
    edit_weights(folder, lambda tensors: tensors | {"bert.embeddings.LayerNorm.gamma": torch.ones(24)})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.unused == ("bert.embeddings.LayerNorm.gamma",)
    assert checkpoint.fingerprint() == expected.fingerprint()


def test_tensors_that_the_class_does_not_use_are_spare(save):
    folder = save("a", "bert", "masked-lm")
    expected = opened(folder)
    edit_weights(folder, lambda tensors: tensors | {"cls.seq_relationship.bias": torch.ones(2)})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.unused == tuple(checkpoint.spare) == ("cls.seq_relationship.bias",)
    assert checkpoint.tensors == expected.tensors
    assert torch.equal(checkpoint.weights.read("cls.seq_relationship.bias"), torch.ones(2))


# -- models that transformers does not know


class PlainConfig(PreTrainedConfig):
    model_type = "plain-net"
    width: int = 4


class PlainNet(PreTrainedModel):
    config_class = PlainConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(config.width, 3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(11))
        self.post_init()


def test_a_model_type_that_transformers_does_not_know_keeps_its_names(tmp_path, caplog):
    PlainNet(PlainConfig()).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_llfc"):
        checkpoint = open_checkpoint(tmp_path)
    assert "does not know the model type 'plain-net'" in caplog.text
    assert (checkpoint.config.model_type, checkpoint.config.width) == ("plain-net", 4)
    assert (checkpoint.architecture, checkpoint.model_class) == ("PlainNet", None)
    assert list(checkpoint.tensors)[-2:] == ["layers.10.bias", "layers.10.weight"]
    assert open_checkpoint(PlainNet(PlainConfig())).model_class is PlainNet


def test_a_registered_class_of_ones_own_is_known(tmp_path, monkeypatch):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    monkeypatch.setattr(MODEL_MAPPING, "_extra_content", dict(MODEL_MAPPING._extra_content))
    transformers.AutoConfig.register("plain-net", PlainConfig)
    transformers.AutoModel.register(PlainConfig, PlainNet)
    PlainNet(PlainConfig()).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model_class is PlainNet and isinstance(checkpoint.config, PlainConfig)


REMOTE_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class TinyConfig(PreTrainedConfig):
    model_type = "tiny-remote"
    width: int = 4

class TinyRemote(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(config.width, 3)
        self.post_init()
"""


def test_code_that_comes_with_a_checkpoint_runs_only_if_trusted(tmp_path):
    (tmp_path / "modeling_tiny.py").write_text(REMOTE_CODE)
    config = {
        "model_type": "tiny-remote",
        "architectures": ["TinyRemote"],
        "auto_map": {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyRemote"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"first.weight": torch.ones(3, 4), "first.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    distrusted = open_checkpoint(tmp_path)
    assert distrusted.model_class is None
    assert type(distrusted.config).__name__ == "UnknownConfig"
    trusted = open_checkpoint(tmp_path, trust_remote_code=True)
    assert trusted.model_class.__name__ == "TinyRemote" and trusted.config.width == 4
    assert trusted.fingerprint() == distrusted.fingerprint()
    assert [path.name for path in trusted.companion_files] == ["modeling_tiny.py"]


def test_trusted_code_that_is_broken_is_one_error(tmp_path):
    (tmp_path / "modeling_tiny.py").write_text("1 / 0")
    config = {"model_type": "bert", "architectures": ["Broken"], "auto_map": {"AutoModel": "modeling_tiny.Broken"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the code of Broken cannot be loaded: division by zero"):
        open_checkpoint(tmp_path, trust_remote_code=True)


# -- configs


def test_a_config_without_model_type_is_resolved_from_its_architecture(save):
    folder = save()
    edit_config(folder, model_type=None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.model_type == "bert"
    assert checkpoint.architecture == "BertForSequenceClassification"


def test_a_config_that_names_neither_is_refused_with_what_to_add(save):
    folder = save()
    edit_config(folder, model_type=None, architectures=["RobertaForMyTask"])
    refused(folder, "config.json", "'RobertaForMyTask'", 'add "model_type", perhaps "roberta"')
    edit_config(folder, architectures=None)
    refused(folder, "neither model_type nor architectures", 'add "model_type"')


def test_a_config_without_architectures_keeps_the_names_of_the_file(save):
    folder = save()
    edit_config(folder, architectures=None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.architecture is None and checkpoint.model_class is None
    assert "bert.pooler.dense.bias" in checkpoint.tensors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("\xff", "not valid JSON"),
        ('{"model_type": "bert", "architectures": "BertModel"}', "architectures must be a list"),
        ('{"model_type": "bert", "architectures": [1]}', "architectures must be a list"),
        ('{"model_type": "bert", "hidden_size": "large"}', "transformers cannot read this config"),
        (
            '{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 10, "num_attention_heads": 3}',
            "BertModel cannot be built from this config",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_one_error(save, text, expected):
    folder = save()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, f"{folder}/config.json: ", expected)


# -- folders


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nothing", "there is no such folder")
    refused("./nothing", "there is no such folder")
    refused("/a/b/c", "there is no such folder")


def test_a_file_in_place_of_a_folder_is_refused(save):
    refused(save() / "model.safetensors", "this is a file; give the folder")


def test_a_folder_without_config_is_refused_with_what_it_holds(save, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no config.json", "it holds nothing")
    save("runs")
    outer = tmp_path / "outer"
    outer.mkdir()
    os.rename(tmp_path / "runs", outer / "checkpoint-500")
    refused(outer, "no config.json", f"did you mean {outer / 'checkpoint-500'}?")


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(2, 2)], ids=lambda model: type(model).__name__)
def test_something_that_is_no_model_is_refused(model):
    refused(model, f"found {type(model).__name__}")


# -- weights


def test_a_folder_without_weights_is_refused(save):
    folder = save()
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights found", "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model-q4.gguf", "GGUF files, which are quantised"),
        ("adapter_model.safetensors", "an adapter without its adapter_config.json, not a model"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("consolidated.00.pth", "author's own format"),
        ("model.fp16.safetensors", "neither model.safetensors nor"),
    ],
)
def test_weights_of_another_kind_are_refused_with_what_to_do(save, name, expected):
    folder = save()
    os.rename(folder / "model.safetensors", folder / name)
    refused(folder, expected)


def test_gguf_without_config_is_recognised(tmp_path):
    (tmp_path / "model.gguf").touch()
    refused(tmp_path, "GGUF", "quantised")
    refused(tmp_path / "model.gguf", "GGUF is quantised")


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("qweight", torch.int32, "qzeros is missing"),
        ("weight.absmax", torch.float32, "quantised layer (bitsandbytes)"),
        ("weight", torch.int8, "quantised layer (of a kind that is not known)"),
        ("weight", torch.float8_e4m3fn, "has no scales"),
    ],
)
def test_quantised_tensors_that_cannot_be_read_are_refused_without_a_config_too(save, name, dtype, expected):
    folder = save()
    name = f"bert.encoder.layer.0.output.dense.{name}"
    edit_weights(folder, lambda tensors: tensors | {name: torch.zeros(24, 40).to(dtype)})
    refused(folder, f"tensor {name}", expected)


def test_a_quantised_model_in_memory_is_refused():
    model = tiny_model("bert", "base")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused(model, "quantised (bitsandbytes)", "give the folder or the id")


def test_all_missing_and_misshapen_tensors_are_named_at_once(save):
    folder = save()

    def damage(tensors):
        del tensors["classifier.bias"], tensors["bert.encoder.layer.1.output.dense.weight"]
        tensors["bert.pooler.dense.weight"] = torch.zeros(24, 23)
        return tensors

    edit_weights(folder, damage)
    refused(
        folder,
        f"{folder}: the tensors are not those of BertForSequenceClassification as config.json describes it; fetch or "
        "save the checkpoint again: 3 problems",
        "tensor classifier.bias of shape [5] is missing",
        "tensor bert.encoder.layer.1.output.dense.weight of shape [24, 40] is missing",
        "tensor bert.pooler.dense.weight has shape [24, 23], but the config makes it [24, 24]",
    )


def test_a_missing_or_misshapen_tensor_in_the_layout_of_the_memory_is_named(tmp_path):
    model = tiny_model("mixtral", "causal-lm")
    model.save_pretrained(tmp_path, save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    edit_weights(tmp_path, lambda tensors: tensors | {name: tensors[name][:, :, 1:]})
    experts, width, residual = model.config.num_local_experts, model.config.intermediate_size, model.config.hidden_size
    found, expected = [experts, 2 * width, residual - 1], [experts, 2 * width, residual]
    refused(tmp_path, f"tensor {name} has shape {found}, but the config makes it {expected}")
    edit_weights(tmp_path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    last = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    message = refused(tmp_path, f"tensor {last} of shape [{width}, {residual}] is missing")
    assert message.count("is missing") == 2 * experts


def test_a_missing_expert_is_named(tmp_path):
    tiny_model("mixtral", "causal-lm").save_pretrained(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    edit_weights(tmp_path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    assert refused(tmp_path, f"tensor {name} of shape [", "is missing").count("is missing") == 1


def test_a_config_of_another_size_is_refused(save):
    folder = save()
    edit_config(folder, intermediate_size=44)
    refused(
        folder, "bert.encoder.layer.0.intermediate.dense.weight has shape [40, 24], but the config makes it [44, 24]"
    )


def test_a_file_that_is_cut_off_names_file_and_tensor(save):
    folder = save()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, f"{path}: the file is cut off: tensor classifier.weight needs")
    path.write_bytes(path.read_bytes()[:50])
    refused(folder, f"{path}: the file is cut off inside its header")
    path.write_bytes(b"")
    refused(folder, f"{path}: not a safetensors file, or cut off")


def test_a_shard_that_is_cut_off_names_file_and_tensor(save):
    folder = save("a", max_shard_size=20_000)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, f"{shard}: the file is cut off: tensor ")


def test_a_file_that_changes_after_it_was_opened_is_refused(save):
    folder = save()
    checkpoint = open_checkpoint(folder)
    edit_weights(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read("classifier.bias")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("classifier.bias")


def written_in_place(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    os.utime(path, ns=(0, 1))


def replaced(path):
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [written_in_place, replaced, lambda path: os.truncate(path, 100), Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_told_afterwards(save, change):
    folder = save()
    checkpoint = open_checkpoint(folder)
    checkpoint.read("classifier.bias")
    checkpoint.refuse_changed()
    change(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        checkpoint.refuse_changed()


def test_what_tells_two_checkpoints_apart_is_json_and_sees_every_change(save):
    folder = save()
    before = open_checkpoint(folder).identity()
    assert json.loads(json.dumps(before)) == before == open_checkpoint(folder).identity()
    written_in_place(folder / "model.safetensors")
    after = open_checkpoint(folder).identity()
    assert after["files"]["model.safetensors"] != before["files"]["model.safetensors"]
    assert {**after, "files": None} == {**before, "files": None}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert open_checkpoint(folder).identity()["config"] != before["config"]


def test_a_model_in_memory_is_told_apart_by_its_weights():
    models = [tiny_model("bert", "base", seed) for seed in (0, 0, 1)]
    first, same, other = (open_checkpoint(model).identity() for model in models)
    assert first == same and first["sha256"] != other["sha256"]


def test_a_tensor_that_is_not_there_is_refused_with_the_nearest(save):
    with pytest.raises(CheckpointError, match=r"no tensor classifier.biass; did you mean 'classifier.bias'\?"):
        open_checkpoint(save()).read("classifier.biass")


# -- indexes


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index)))


def move(index, name, shard):
    index["weight_map"][name] = shard
    return index


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: [], "expected a JSON object"),
        (lambda index: {}, "expected a weight_map"),
        (lambda index: {"weight_map": {}}, "expected a weight_map"),
        (lambda index: {"weight_map": {"x": 3}}, "the file 3 with tensor x is missing"),
        (
            lambda index: move(index, "classifier.bias", "gone.safetensors"),
            "gone.safetensors with tensor classifier.bias",
        ),
        (lambda index: move(index, "classifier.bias", "../a/x.safetensors"), "outside the checkpoint's folder"),
        (lambda index: move(index, "classifier.bias", "/etc/passwd"), "outside the checkpoint's folder"),
        (lambda index: move(index, "classifier.bias", "..\\x.safetensors"), "outside the checkpoint's folder"),
        (lambda index: move(index, "classifier.bias", "C:x.safetensors"), "outside the checkpoint's folder"),
        (
            lambda index: move(index, "classifier.bias", "model-00001-of-00003.safetensors"),
            "tensor classifier.bias should be in model-00001-of-00003.safetensors, but is in model-00003",
        ),
        (
            lambda index: move(index, "new", "model-00001-of-00003.safetensors"),
            "tensor new should be in model-00001-of-00003.safetensors",
        ),
    ],
)
def test_an_index_that_does_not_fit_is_one_error(save, change, expected):
    folder = save("a", max_shard_size=20_000)
    edit_index(folder, change)
    refused(folder, "model.safetensors.index.json", expected)


def test_a_tensor_in_two_shards_is_refused(save):
    folder = save("a", max_shard_size=20_000)
    shard = folder / "model-00001-of-00003.safetensors"
    save_file(load_file(shard) | {"classifier.bias": torch.ones(5)}, shard)
    refused(folder, "tensor classifier.bias is in model-00001-of-00003.safetensors and again in model-00003")


# -- .bin files


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def to_pickle(folder: Path, **options) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_bin_file_is_read_like_safetensors(save, zipped):
    folder = save("a", "bert", "masked-lm")
    expected = opened(folder)
    to_pickle(folder, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(folder, allow_pickle=True)
    assert checkpoint.tensors == expected.tensors
    assert checkpoint.fingerprint() == expected.fingerprint()


def test_a_bin_file_with_both_tied_weights_has_one(tmp_path):
    model = tiny_model("gpt2", "causal-lm")
    model.config.save_pretrained(tmp_path)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.fingerprint() == open_checkpoint(model).fingerprint()


@pytest.mark.parametrize("odd", [None, "shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_all_copies_of_a_weight_that_is_tied_more_than_once_are_compared(tmp_path, odd):
    config = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    expected = open_checkpoint(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} <= set(
        state
    )
    if odd is not None:
        state[odd] += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert checkpoint.tensors == expected.tensors and checkpoint.unused == ()
    if odd is None:
        assert checkpoint.fingerprint() == expected.fingerprint()
        return
    with pytest.raises(
        CheckpointError, match=r"the config ties .* to shared\.weight, but the file holds two different"
    ):
        checkpoint.fingerprint()


def test_bin_shards_are_read(save):
    folder = save()
    expected = open_checkpoint(folder).fingerprint()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for part, held in parts.items():
        torch.save({name: tensors[name] for name in held}, folder / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert open_checkpoint(folder, allow_pickle=True).fingerprint() == expected


def test_a_bin_file_is_ignored_beside_safetensors(save, tmp_path):
    folder = save()
    torch.save({"x": Payload(tmp_path / "hacked")}, folder / "pytorch_model.bin")
    open_checkpoint(folder).fingerprint()
    assert not (tmp_path / "hacked").exists()


def test_a_bin_file_that_would_run_code_is_refused_and_does_not_run(save, tmp_path):
    folder = save()
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Payload(tmp_path / "hacked")}, folder / "pytorch_model.bin")
    refused(folder, f"{folder}/pytorch_model.bin", "could run code", "left unread", allow_pickle=True)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"model": {"x": torch.ones(2)}, "epoch": 3}, "'model' is a dict, expected a tensor"),
        ([torch.ones(2)], "expected tensors by name, found a list"),
    ],
)
def test_a_bin_file_of_a_training_run_is_refused(save, state, expected):
    folder = save()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", expected, allow_pickle=True)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_bin_file_that_is_cut_off_is_refused(save, kept):
    folder = save()
    to_pickle(folder)
    path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    refused(folder, f"{path}: ", allow_pickle=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_bin_file_is_not_opened_unless_asked_for(save, tmp_path, name):
    folder = save()
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Payload(tmp_path / "hacked")}, folder / name)
    refused(folder, f"{folder}: the weights are pickled", "--allow-pickle", "allow_pickle=True in Python")
    assert not (tmp_path / "hacked").exists()


# -- models in memory


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = transformers.BertModel(tiny_config("bert"))
    refused(model, "BertModel", "not in memory")


def test_a_model_whose_class_does_not_declare_its_ties_is_refused():
    model = tiny_model("bert", "base")
    layers = model.encoder.layer
    layers[0].output.dense.weight = layers[1].output.dense.weight
    refused(model, "cannot be named as on disk", "encoder.layer.0.output.dense.weight")


def test_the_state_on_disk_is_what_save_pretrained_writes(tmp_path):
    model = tiny_model("mixtral", "causal-lm")
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    state = state_dict_on_disk(model)
    assert state.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in state.items())
