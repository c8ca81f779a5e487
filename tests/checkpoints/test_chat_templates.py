"""The chat template of a result: of the models, by name, or as it is given."""

import json

import pytest

import hf_llfc
from hf_llfc.checkpoints.chat_templates import TEMPLATES, own_template
from hf_llfc.checkpoints.opening import open_checkpoint
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.choices import CHAT_TEMPLATES
from tests.checkpoints.conftest import save_tokenizer
from tests.tiny_models import tiny_model

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Who are you?"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hi<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHello [/INST] Hi</s> [INST] Who are you? [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi\n\n### Instruction:\nWho are you?\n\n"
    "### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi[|endofturn|]\n[|user|]Who are you?\n"
    "[|assistant|]",
}


def rendered(template: str, messages: list[dict[str, str]] = TALK) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return texts[0]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Three models: the first has its template in its settings, the others one in a file."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        tiny_model("bert", "sequence-classification", seed).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    path = tmp_path / "a" / "tokenizer_config.json"
    templates = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": "{{ 'of a' }}"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    for name in "bc":
        (tmp_path / name / "chat_template.jinja").write_text("{{ 'of most' }}\n")
    return tmp_path


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_format_renders_as_its_models_know_it(name):
    assert set(TEMPLATES) == set(CHAT_TEMPLATES) == set(RENDERED)
    assert rendered(TEMPLATES[name]) == RENDERED[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_format_is_that_of_mergekit_but_for_line_breaks(name):
    resources = pytest.importorskip("importlib.resources")
    data = pytest.importorskip("mergekit._data.chat_templates", reason="mergekit is not installed")
    theirs = resources.files(data).joinpath(f"{name}.jinja").read_text()
    assert "".join(rendered(TEMPLATES[name]).split()) == "".join(rendered(theirs).split())


def test_turns_that_do_not_alternate_are_refused_by_the_template():
    with pytest.raises(Exception, match="take turns"):
        rendered(TEMPLATES["mistral"], [TALK[2], TALK[1]])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, None), ("auto", "{{ 'of most' }}"), ("chatml", TEMPLATES["chatml"]), ("{{ 'mine' }}", "{{ 'mine' }}")],
)
def test_the_result_has_the_template_that_is_asked_for(asked, expected, shelf):
    hf_llfc.merge(["a", "b", "c"], out="out", chat_template=asked)
    assert own_template(open_checkpoint("out")) == (expected or "{{ 'of a' }}")
    settings = json.loads((shelf / "out" / "tokenizer_config.json").read_text())
    assert ("chat_template" in settings) == (asked is None)


def test_no_template_among_the_models_is_said(shelf, caplog):
    (shelf / "b" / "chat_template.jinja").unlink()
    hf_llfc.merge(["b"], out="out", chat_template="auto")
    assert "chat_template: none of the models has one" in caplog.text
    assert not (shelf / "out" / "chat_template.jinja").exists()


def test_what_is_no_template_is_refused(shelf):
    with pytest.raises(CheckpointError, match="chat_template: is no valid template at line 1"):
        hf_llfc.merge(["a"], out="out", chat_template="{% for message in messages %}")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (shelf / "a" / file).unlink()
    with pytest.raises(CheckpointError, match="chat_template: a has no tokenizer that it could go with"):
        hf_llfc.merge(["a"], out="out", chat_template="chatml")
    assert not (shelf / "out").exists()
