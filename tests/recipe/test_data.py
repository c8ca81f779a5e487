import subprocess
import sys

import pytest

from hf_llfc.errors import EvaluationError
from hf_llfc.recipe.data import TASKS, EvaluationConfig


@pytest.mark.parametrize("name", TASKS)
def test_an_alias_is_replaced_by_the_task(name):
    assert EvaluationConfig(task=name, dataset="rows.csv").task == TASKS[name]


def test_all_faults_are_listed_at_once():
    with pytest.raises(EvaluationError) as caught:
        EvaluationConfig(
            task="text-clasification", dataset="x", samples=0, batch_size=True, max_length=-1, seed=-1, mask_fraction=2
        )
    message = str(caught.value)
    assert "did you mean 'text-classification'?" in message
    for field in ("samples", "batch_size", "max_length", "seed", "mask_fraction"):
        assert f"- {field}: " in message


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("text-classification", {"image_column": "x"}),
        ("text-classification", {"blocks": False}),
        ("text-classification", {"rescale_factor": 1.0}),
        ("image-classification", {"text_column": "x"}),
        ("image-classification", {"tokenizer": "bytes"}),
        ("image-classification", {"max_length": 8}),
        ("fill-mask", {"label_column": "x"}),
        ("fill-mask", {"label_map": {"a": 1}}),
        ("text-generation", {"text_pair_column": "x"}),
    ],
)
def test_a_setting_that_the_task_would_ignore_is_refused(task, settings):
    (field,) = settings
    with pytest.raises(EvaluationError, match=f"{field}: has no meaning for the task {task}"):
        EvaluationConfig(task=task, dataset="x", **settings)


def test_a_language_model_needs_two_tokens():
    with pytest.raises(EvaluationError, match="at least 2"):
        EvaluationConfig(task="text-generation", dataset="x", max_length=1)


def test_the_summary_has_what_differs_from_the_defaults():
    config = EvaluationConfig(task="causal-lm", dataset="rows.txt", metric="perplexity", samples=7)
    expected = {"task": "text-generation", "dataset": "rows.txt", "metric": ["perplexity"], "samples": 7}
    assert config.summary() == expected


def test_the_settings_need_no_heavy_library():
    code = (
        "import hf_llfc.evaluation, hf_llfc.diagnostics, sys; print('torch' in sys.modules, 'datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
