import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import PretrainedConfig

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.sources import choose_column, choose_samples, class_indices, open_dataset, pinned
from hf_llfc.recipe.data import EvaluationConfig

ROWS = {"text": ["a b", "c", "d e f"], "label": [0, 1, 0]}


def config_for(dataset, task="text-classification", **settings) -> EvaluationConfig:
    return EvaluationConfig(task=task, dataset=dataset, **settings)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    rows = datasets.Dataset.from_dict(ROWS)
    if suffix in ("csv", "tsv"):
        rows.to_csv(path, sep="\t" if suffix == "tsv" else ",")
    elif suffix == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, lines=suffix == "jsonl")
    assert open_dataset(config_for(path)).to_dict() == ROWS
    assert open_dataset(config_for(str(path), split="train[1:]")).to_dict() == {"text": ["c", "d e f"], "label": [1, 0]}


def test_a_text_file_is_lines_or_one_document(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("one\n\n  two\n")
    assert open_dataset(config_for(path, "fill-mask")).to_dict() == {"text": ["one", "  two"]}
    assert open_dataset(config_for(path, "text-generation")).to_dict() == {"text": ["one\n\n  two\n"]}


def test_folders(tmp_path):
    rows = datasets.Dataset.from_dict(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(tmp_path / "several")
    assert open_dataset(config_for(tmp_path / "one")).to_dict() == ROWS
    assert open_dataset(config_for(tmp_path / "several")).to_dict() == ROWS
    for split in ("train", "test"):
        for name in ("10", "2"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / "images" / split / name / "0.png")
    images = open_dataset(config_for(tmp_path / "images", "image-classification", split="train"))
    assert images.features["label"].names == ["10", "2"]
    assert len(images) == 2


def test_a_loaded_dataset_is_taken_as_it_is():
    rows = datasets.Dataset.from_dict(ROWS)
    assert open_dataset(config_for(rows)) is rows
    with pytest.raises(EvaluationError, match="already is"):
        open_dataset(config_for(rows, split="test"))


def test_the_split_is_validation_then_test_then_asked_for():
    rows = datasets.Dataset.from_dict(ROWS)
    first, second, third = (rows.select([index]) for index in range(3))
    splits = datasets.DatasetDict({"train": first, "test": second, "validation": third})
    assert open_dataset(config_for(splits)).to_dict() == third.to_dict()
    del splits["validation"]
    assert open_dataset(config_for(splits)).to_dict() == second.to_dict()
    assert open_dataset(config_for(splits, split="train")).to_dict() == first.to_dict()
    with pytest.raises(EvaluationError, match=r"no split 'tset'; did you mean 'test'\? \(it has: train, test\)"):
        open_dataset(config_for(splits, split="tset"))
    del splits["test"]
    splits["other"] = rows
    with pytest.raises(EvaluationError, match=r"several splits \(train, other\); set split"):
        open_dataset(config_for(splits))


def test_data_of_the_hub_are_named_with_their_commit_and_split(tmp_path):
    commit, fingerprint = "0123456789abcdef" * 2 + "01234567", "0123456789abcdef"
    rows = {}
    for folder in (commit, fingerprint):
        prepared = tmp_path / "ada___reviews" / "default" / "0.0.0" / folder
        datasets.Dataset.from_dict(ROWS).save_to_disk(prepared)
        rows[folder] = datasets.Dataset.from_file(
            str(prepared / "data-00000-of-00001.arrow"), split=datasets.Split.VALIDATION
        )
    config = config_for("ada/reviews@main")
    found = pinned(config, rows[commit])
    assert (found.dataset, found.split) == (f"ada/reviews@{commit}", "validation")
    assert pinned(config_for("ada/reviews", split="test[:2]"), rows[commit]).split == "test[:2]"
    assert pinned(config, rows[fingerprint]) == config
    assert pinned(config, datasets.Dataset.from_dict(ROWS)) == config
    local = config_for(str(tmp_path))
    assert pinned(local, rows[commit]) == local


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    # Otherwise the Hub's libraries wait and try again before they give up.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "rows.csv").write_text("text,label\n")
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    for dataset, settings, message in (
        (tmp_path / "missing.csv", {}, r"missing\.csv does not exist"),
        ("./nowhere", {}, "does not exist"),
        (tmp_path / "rows.xlsx", {}, r"known: \.csv"),
        (tmp_path / "broken.parquet", {}, r"broken\.parquet cannot be loaded"),
        (tmp_path / "rows.csv", {}, r"rows\.csv has no rows; give data"),
        (tmp_path / "rows.csv", {"name": "x"}, "leave name out"),
        (tmp_path / "rows.csv", {"split": "test"}, 'Unknown split "test"'),
        (tmp_path / "saved", {"split": "test"}, "without configurations or splits"),
        ("nobody/nothing", {}, "dataset nobody/nothing cannot be loaded"),
        (7, {}, "not int"),
    ):
        with pytest.raises(EvaluationError, match=message):
            open_dataset(config_for(dataset, **settings))


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "txt"])
def test_a_file_with_nothing_in_it_has_no_rows(tmp_path, kind, content):
    if (content, kind) in {("[]", "csv"), ("[]", "tsv")}:
        content = "text,label\n"
    elif (content, kind) == ("[]", "txt"):
        content = "  \n"
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=rf"^dataset .*rows\.{kind} has no rows; give data with at least one$"):
        open_dataset(config_for(path))


def test_a_missing_column_is_an_error_with_the_nearest():
    rows = datasets.Dataset.from_dict({"sentense": ["a"], "other": ["b"], "label": [0]})
    config = config_for(rows)

    def choose(wanted, usual=("text", "sentence"), feature=datasets.Value):
        return choose_column(rows, wanted, setting="text_column", usual=usual, feature=feature, config=config)

    with pytest.raises(
        EvaluationError,
        match=r"no column 'sentence' \(text_column\); did you mean 'sentense'\? \(its columns: sentense, other,",
    ):
        choose("sentence")
    with pytest.raises(EvaluationError, match="several columns might be it: sentense, other"):
        choose(None)
    assert choose("other") == "other"
    assert choose(None, usual=("nothing", "other")) == "other"
    assert (
        choose_column(
            rows.remove_columns("other"),
            None,
            setting="text_column",
            usual=("text",),
            feature=datasets.Value,
            config=config,
        )
        == "sentense"
    )


def test_samples_depend_on_the_seed_alone():
    rows = datasets.Dataset.from_dict({"text": ["a"] * 50})
    chosen = choose_samples(50, config_for(rows, samples=9, seed=3), "rows")
    again = choose_samples(50, config_for(rows, samples=9, seed=3, batch_size=2), "rows")
    other = choose_samples(50, config_for(rows, samples=9, seed=4), "rows")
    assert chosen.tolist() == again.tolist() != other.tolist()
    assert len(set(chosen.tolist())) == 9
    everything = choose_samples(50, config_for(rows, seed=3), "rows")
    assert sorted(everything.tolist()) == list(range(50))
    assert everything[:9].tolist() == chosen.tolist()
    with pytest.raises(EvaluationError, match="samples is 51, but dataset in memory has only 50 rows"):
        choose_samples(50, config_for(rows, samples=51), "rows")


NAMED = {"label2id": {"NEGATIVE": 0, "POSITIVE": 1}, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}}
CLASSES = datasets.ClassLabel(names=["positive", "negative"])


@pytest.mark.parametrize(
    ("values", "feature", "model", "label_map", "expected"),
    [
        pytest.param([0, 1], datasets.Value("int64"), {"num_labels": 2}, None, [0, 1], id="numbers"),
        pytest.param([1, 0], datasets.Value("int64"), NAMED, None, [1, 0], id="numbers-for-names"),
        pytest.param([0.0, 1.0], datasets.Value("float64"), NAMED, None, [0, 1], id="whole-floats"),
        pytest.param([True, False], datasets.Value("bool"), NAMED, None, [1, 0], id="booleans"),
        pytest.param(["1", " 0"], datasets.Value("string"), NAMED, None, [1, 0], id="digits"),
        pytest.param(["Positive", "negative"], datasets.Value("string"), NAMED, None, [1, 0], id="names"),
        pytest.param([0, 1], CLASSES, NAMED, None, [1, 0], id="class-names"),
        pytest.param([0, 1], CLASSES, {"num_labels": 2}, None, [0, 1], id="class-names-for-nameless"),
        pytest.param(
            [0, 1, 2], datasets.ClassLabel(names=["0", "10", "2"]), {"num_labels": 11}, None, [0, 10, 2], id="folders"
        ),
        pytest.param([4, 0], datasets.Value("int64"), NAMED, {"4": "positive", "0": 0}, [1, 0], id="label-map"),
        pytest.param(
            ["good", "bad"], datasets.Value("string"), NAMED, {"good": 1, "bad": "NEGATIVE"}, [1, 0], id="names-map"
        ),
    ],
)
def test_labels_become_the_models_classes(values, feature, model, label_map, expected):
    rows = datasets.Dataset.from_dict({"label": values}, features=datasets.Features({"label": feature}))
    config = config_for(rows, label_map=label_map)
    found = class_indices(rows, "label", np.arange(len(values)), PretrainedConfig(**model), config)
    assert found.tolist() == expected
    backwards = class_indices(rows, "label", np.arange(len(values))[::-1], PretrainedConfig(**model), config)
    assert backwards.tolist() == expected[::-1]


@pytest.mark.parametrize(
    ("values", "feature", "label_map", "message"),
    [
        pytest.param([0, 2], datasets.Value("int64"), None, r"class 2, but the model's config has 2 classes \(row 1\)"),
        pytest.param([0, -1], CLASSES, None, "without labels"),
        pytest.param(
            ["positive", "neutral"], datasets.Value("string"), None, "has: NEGATIVE, POSITIVE.; set label_map"
        ),
        pytest.param(["positve"], datasets.Value("string"), None, "did you mean 'POSITIVE'"),
        pytest.param([0, None], datasets.Value("int64"), None, "a label is missing .row 1"),
        pytest.param([0, 1], datasets.Value("int64"), {"0": 0}, "label '1' is not in label_map"),
        pytest.param([0.5], datasets.Value("float64"), None, "label '0.5' is none of the model's"),
        pytest.param([[0]], datasets.List(datasets.Value("int64")), None, "holds lists"),
    ],
)
def test_labels_without_a_class_are_refused(values, feature, label_map, message):
    rows = datasets.Dataset.from_dict({"label": values}, features=datasets.Features({"label": feature}))
    with pytest.raises(EvaluationError, match=message):
        class_indices(
            rows, "label", np.arange(len(values)), PretrainedConfig(**NAMED), config_for(rows, label_map=label_map)
        )
