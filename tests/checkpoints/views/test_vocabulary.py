"""`tokenizer_source: union`: models of different vocabularies become one model that knows every token of them."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_llfc
from hf_llfc.adapters.derived.verify import randomise
from hf_llfc.checkpoints import compare, load_model, open_checkpoint
from hf_llfc.checkpoints.views.reindexed import vocabulary_dimensions
from hf_llfc.checkpoints.views.vocabulary import Vocabulary
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.parents.opening import open_recipe
from hf_llfc.pipeline.identity import identity_of_run
from hf_llfc.recipe import Recipe, load_recipe
from tests.runs import moved
from tests.tiny_models import AUTO_CLASSES, TINY, logits, tiny_config, tiny_inputs, tiny_model
from tests.vocabularies import SPECIAL, TEXTS, save, trained, vocabulary


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected_rows(
    names: list[str], union: dict[str, int], tensor: str, dimension: int, base: str | None
) -> list[Tensor]:
    """The oracle, token by token in float64: what every model's rows are in the union."""
    own = {name: load_file(Path(name) / "model.safetensors")[tensor].double().movedim(dimension, 0) for name in names}
    known = {name: vocabulary(name) for name in names}
    result = []
    for name in names:
        rows: list[Tensor] = [torch.empty(0)] * len(union)
        for token, index in union.items():
            if token in known[name]:
                rows[index] = own[name][known[name][token]]
            elif base is not None and token in known[base]:
                rows[index] = own[base][known[base][token]]
            else:
                having = [own[other][known[other][token]] for other in names if token in known[other]]
                rows[index] = torch.stack(having).mean(dim=0).float().double()
        result.append(torch.stack(rows).movedim(0, dimension))
    return result


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_the_tokenizer_knows_every_token(kind, shelf):
    for name in "abc":
        save(shelf / name, trained(kind, name), "llama", "causal-lm", ord(name), padding=2)
    hf_llfc.merge(["a", "b", "c"], out="out", tokenizer_source="union")
    union, first = vocabulary("out"), vocabulary("a")
    assert union.keys() == set().union(*(vocabulary(name) for name in "abc"))
    assert sorted(union.values()) == list(range(len(union))) and union.items() >= first.items()
    assert AutoConfig.from_pretrained("out").vocab_size == len(union)
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.get_vocab() == union
    alone = AutoTokenizer.from_pretrained("a")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (alone.pad_token_id, alone.eos_token_id)
    assert tokenizer.chat_template == "a"
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert added == {**dict.fromkeys(SPECIAL, True), "<one>": True, "<two>": False, "<three>": False}
    # A text of any of the models is cut into tokens without an unknown one, and comes back where it is spelled out.
    for name in "abc":
        text = f"{TEXTS[name]}<one> <two>"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and {union["<one>"], union["<two>"]} <= set(ids)
        assert kind != "BPE" or tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["WordPiece", "BPE"])
def test_pieces_of_another_model_are_put_together_as_there(kind, shelf):
    for name in "ab":
        save(shelf / name, trained(kind, name), "llama", "causal-lm", ord(name))
    hf_llfc.merge(["a", "b"], out="out", tokenizer_source="union")
    united, alone = (Tokenizer.from_file(str(shelf / name / "tokenizer.json")) for name in ("out", "b"))
    assert "musique" in "".join(alone.encode(" musique").tokens).replace("Ġ", "")
    assert len(alone.encode(" musique").tokens) == 1
    assert united.encode(" musique").tokens == alone.encode(" musique").tokens


@pytest.mark.parametrize(
    ("family", "head", "tensors"),
    [
        ("bert", "masked-lm", {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0}),
        ("bert", "sequence-classification", {"bert.embeddings.word_embeddings.weight": 0}),
        ("gpt2", "causal-lm", {"transformer.wte.weight": 0}),
        ("llama", "causal-lm", {"model.embed_tokens.weight": 0, "lm_head.weight": 0}),
        ("llama-tied", "causal-lm", {"model.embed_tokens.weight": 0}),
    ],
)
@pytest.mark.parametrize("with_base", [False, True])
def test_rows_are_those_of_the_oracle(family, head, tensors, with_base, shelf):
    for name in "abc":
        save(shelf / name, trained("WordLevel", name), family, head, ord(name), padding=ord(name) % 3)
    assert vocabulary_dimensions(open_checkpoint("a")) == tensors
    weights = [0.7, 0.3]
    method = {"merge_method": "task_arithmetic", "base_model": "c"} if with_base else {}
    names = ["a", "b", "c"] if with_base else ["a", "b"]
    hf_llfc.merge(["a", "b"], weights, out="out", tokenizer_source="union", **method)
    union, found = vocabulary("out"), load_file("out/model.safetensors")
    others = [load_file(Path(name) / "model.safetensors") for name in names]
    assert found.keys() == others[0].keys()
    for tensor, merged in found.items():
        if tensor in tensors:
            rows = expected_rows(names, union, tensor, tensors[tensor], "c" if with_base else None)
        else:
            rows = [other[tensor].double() for other in others]
        if with_base:
            expected = rows[2] + sum(weight * (own - rows[2]) for weight, own in zip(weights, rows[:2], strict=True))
        else:
            expected = sum(weight * own for weight, own in zip(weights, rows, strict=True))
        assert merged.shape == expected.shape
        torch.testing.assert_close(merged.double(), expected, rtol=1e-7, atol=1e-8)
    assert load_model(open_checkpoint("out")) is not None


def test_a_parent_answers_over_the_union_as_it_did(shelf):
    model = save(shelf / "a", trained("WordLevel", "a"), "llama", "causal-lm", 1)
    save(shelf / "b", trained("WordLevel", "b"), "llama", "causal-lm", 2)
    opened = open_recipe(recipe_of(["b", "a"]))
    (_, parent), _ = opened.moved([None, None])
    tokens = sorted(vocabulary("a"), key=vocabulary("a").get)
    places = torch.tensor([opened.union.tokens[token] for token in tokens])
    own = torch.arange(len(tokens))[None]
    with torch.no_grad():
        alone, united = model(own).logits, parent.load()(places[own]).logits
    torch.testing.assert_close(united[..., places], alone, rtol=1e-6, atol=1e-6)


def recipe_of(names: list[str], **changes) -> Recipe:
    content = {"models": [{"model": name} for name in names], "tokenizer_source": "union", "output_dir": "out"}
    return load_recipe({**content, **changes})


@pytest.mark.parametrize("groups", ["permutation", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_are_lent_are_in_the_coordinates_of_the_reference(family, groups, shelf):
    """A model that was moved is aligned and gives the merge that it gave before it was moved."""
    siblings(shelf, family)
    shutil.copytree(shelf / "b", shelf / "moved")
    moved(load_model(open_checkpoint("b")), 5).save_pretrained(shelf / "moved")
    align = {"method": "weight_matching", "groups": groups}
    hf_llfc.merge(["a", "b"], out="plain", tokenizer_source="union", align=align)
    hf_llfc.merge(["a", "moved"], out="aligned", tokenizer_source="union", align=align)
    plain, aligned = load_file("plain/model.safetensors"), load_file("aligned/model.safetensors")
    assert plain.keys() == aligned.keys()
    for name in plain:
        torch.testing.assert_close(aligned[name], plain[name], rtol=0, atol=0 if groups == "permutation" else 2e-5)
    words = plain["model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"]
    foreign = [index for token, index in vocabulary("plain").items() if token not in vocabulary("a")]
    assert foreign and bool((words[foreign] != 0).any(dim=1).all())


def siblings(shelf: Path, family: str) -> None:
    """Two fine-tunes of one model, each with the rows of its own tokens alone."""
    tokenizers = {name: trained("WordLevel", name) for name in "ab"}
    tokens = sorted(set().union(*(tokenizer.get_vocab() for tokenizer in tokenizers.values())))
    for name, tokenizer in tokenizers.items():
        config = tiny_config(family)
        config.vocab_size = len(tokens)
        origin = AUTO_CLASSES["causal-lm"].from_config(config)
        randomise(origin, torch.Generator().manual_seed(0))
        model = save(shelf / name, tokenizer, family, "causal-lm", 0)
        ids = [tokens.index(token) for token in sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)]
        generator = torch.Generator().manual_seed(ord(name))
        state = {}
        for key, tensor in origin.state_dict().items():
            rows = tensor[ids] if tensor.shape[0] == len(tokens) else tensor
            state[key] = rows + 0.01 * torch.randn(rows.shape, generator=generator)
        model.load_state_dict(state)
        model.save_pretrained(shelf / name)


def test_a_pair_is_merged_diagnosed_and_described(shelf):
    siblings(shelf, "llama")
    (shelf / "text.csv").write_text("text\n" + "\n".join(TEXTS["a"].split(", ") + TEXTS["b"].split(", ")) + "\n")
    data = {"task": "text-generation", "dataset": "text.csv", "text_column": "text", "max_length": 32, "alphas": 3}
    hf_llfc.run(recipe_of(["a", "b"], diagnose=data, align={"method": "weight_matching"}))
    recipe = yaml.safe_load((shelf / "out" / "llfc" / "recipe.yaml").read_text())
    assert recipe["tokenizer_source"] == "union"
    report = json.loads((shelf / "out" / "llfc" / "llfc_report.json").read_text())
    assert len(report["path"]) == 3 and all(point["loss"] > 0 for point in report["path"])
    assert "The vocabulary is the union of the vocabularies of all models" in (shelf / "out" / "README.md").read_text()


def test_the_plan_says_who_lacks_how_many(shelf, capsys):
    for name in "ab":
        save(shelf / name, trained("WordLevel", name), "llama", "causal-lm", ord(name))
    words = ["merge", "a", "b", "--tokenizer-source", "union", "--out", "out", "--dry-run", "--format", "json"]
    assert main(words) == 0
    steps = {step["step"]: step["what"] for step in json.loads(capsys.readouterr().out)["steps"]}
    a, b = vocabulary("a"), vocabulary("b")
    union = len(a.keys() | b.keys())
    lacking = f"a lacks {union - len(a)}, b lacks {union - len(b)}"
    assert steps["vocabulary"] == f"union of {union} tokens; {lacking}"
    assert not (shelf / "out").exists()


def test_only_tensors_of_the_vocabulary_are_read_as_a_whole(shelf):
    for name in "ab":
        save(shelf / name, trained("WordLevel", name), "bert", "masked-lm", ord(name))
    parents, _ = open_recipe(recipe_of(["a", "b"])).moved([None, None])
    whole = {name for name in parents[0].checkpoint.tensors if parents[0].span(name) is None}
    assert whole == {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}


def test_a_vocabulary_that_all_share_stays_as_it_is(shelf):
    """Rows beyond the tokenizer are kept then, and so are the files of the tokenizer."""
    for name in "ab":
        save(shelf / name, trained("WordLevel", "a"), "llama", "causal-lm", ord(name), padding=4)
    hf_llfc.merge(["a", "b"], out="out", tokenizer_source="union")
    hf_llfc.merge(["a", "b"], out="plain")
    assert (shelf / "out" / "tokenizer.json").read_bytes() == (shelf / "a" / "tokenizer.json").read_bytes()
    assert (shelf / "out" / "model.safetensors").read_bytes() == (shelf / "plain" / "model.safetensors").read_bytes()


def test_what_an_interrupted_run_has_made_is_known_again(shelf):
    for name in "ab":
        save(shelf / name, trained("WordLevel", name), "llama", "causal-lm", ord(name))
    recipe = recipe_of(["a", "b"])
    first, again = (identity_of_run(recipe, open_recipe(recipe).everything) for _ in range(2))
    assert first == again
    save(shelf / "b", trained("WordLevel", "c"), "llama", "causal-lm", ord("b"))
    assert identity_of_run(recipe, open_recipe(recipe).everything) != first


def test_the_folder_of_the_tokenizer_is_gone_with_the_union(shelf):
    for name in "ab":
        save(shelf / name, trained("WordLevel", name), "llama", "causal-lm", ord(name))
    union = Vocabulary([open_checkpoint("a"), open_checkpoint("b")])
    folder = union.folder
    assert (folder / "tokenizer.json").is_file()
    del union
    assert not folder.exists()


def test_rows_without_a_token_below_others_keep_what_the_first_model_has(shelf):
    words = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, "good": 3, "film": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save(shelf / "a", tokenizer, "llama", "causal-lm", 1, padding=9)
    save(shelf / "b", trained("WordLevel", "b"), "llama", "causal-lm", 2)
    hf_llfc.merge(["a", "b"], out="out", tokenizer_source="union")
    name = "model.embed_tokens.weight"
    assert torch.equal(load_file("out/model.safetensors")[name][4:6], load_file("a/model.safetensors")[name][4:6])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("kind", "type of its tokenizer is 'BPE', that of a 'WordLevel'"),
        ("no tokenizer", "b: has no tokenizer, and the union of vocabularies needs that of every model"),
        ("damaged", "b: the tokenizer cannot be read"),
        ("id", "a: tokenizer.json reaches id 4000000000, more than any vocabulary has"),
        ("rows beyond", "reaches id 5000, and the models have"),
        ("rows", r"no model has a row for 3 of the \d+ ids of the union"),
    ],
)
def test_what_cannot_be_united_is_refused_in_one_message(spoil, expected, shelf):
    save(shelf / "a", trained("WordLevel", "a"), "llama", "causal-lm", 1)
    save(shelf / "b", trained("BPE" if spoil == "kind" else "WordLevel", "b"), "llama", "causal-lm", 2)
    if spoil == "no tokenizer":
        (shelf / "b" / "tokenizer.json").unlink()
    if spoil == "damaged":
        (shelf / "b" / "tokenizer.json").write_text("{}")
    if spoil in ("id", "rows beyond"):
        content = json.loads(Path("b/tokenizer.json").read_text())
        content["model"]["vocab"][max(content["model"]["vocab"])] = 5000 if spoil == "rows beyond" else 4_000_000_000
        shutil.copy("b/tokenizer.json", "a/tokenizer.json")
        Path("a/tokenizer.json").write_text(json.dumps(content))
    if spoil == "rows":
        tokenizer = Tokenizer.from_file("b/tokenizer.json")
        tokenizer.add_tokens(["<x>", "<y>", "<z>"])
        tokenizer.save("b/tokenizer.json")
    with pytest.raises(CheckpointError, match=expected):
        hf_llfc.merge(["a", "b"], out="out", tokenizer_source="union")
    assert not (shelf / "out").exists()


def test_models_are_not_run_before_their_rows_are_filled(shelf):
    align = {"method": "activation_matching", "calibration": {"task": "text-generation", "dataset": "text.csv"}}
    with pytest.raises(RecipeError, match="align: with `tokenizer_source: union` models cannot be run before"):
        recipe_of(["a", "b"], align=align)


def test_without_the_union_the_message_says_that_there_is_one(shelf):
    for name in "ab":
        save(shelf / name, trained("WordLevel", name), "llama", "causal-lm", ord(name))
    problems = compare([open_checkpoint("a"), open_checkpoint("b")])
    assert any("tokenizer_source: union" in problem for problem in problems)


TEXT = [(family, head) for family, head in TINY if "vocab_size" in tiny_config(family).to_dict()]


@pytest.mark.parametrize(("family", "head"), TEXT, ids=[f"{family}-{head}" for family, head in TEXT])
def test_the_order_of_a_vocabulary_does_not_matter(family, head, shelf):
    """The same model under a shuffled vocabulary: transformers says that it is the same, and so does the merge."""
    model = tiny_model(family, head)
    model.save_pretrained(shelf / "a")
    words = [f"word{place}" for place in range(model.config.vocab_size)]
    # Special tokens keep their ids, which the config names.
    order = torch.cat([torch.arange(4), 4 + torch.randperm(len(words) - 4, generator=torch.Generator().manual_seed(3))])
    words_of(shelf / "a", words)
    opened = open_checkpoint("a")
    dimensions = vocabulary_dimensions(opened)
    assert dimensions
    state = {
        name: tensor.index_select(dimensions[name], order) if name in dimensions else tensor
        for name, tensor in opened.state_dict()
    }
    shuffled = load_model(opened, state_dict=state)
    if family == "mixtral":
        shuffled.set_experts_implementation("eager")  # the grouped kernel has no float64
    shuffled.save_pretrained(shelf / "b")
    words_of(shelf / "b", [words[place] for place in order])
    inputs = tiny_inputs(model)
    places = torch.argsort(order)
    found = logits(shuffled, {**inputs, "input_ids": places[inputs["input_ids"]]})
    expected = logits(model, inputs)
    if head in ("masked-lm", "causal-lm"):
        found = found[..., places]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    hf_llfc.merge(["a", "b"], out="out", tokenizer_source="union")
    merged = load_file("out/model.safetensors")
    assert merged.keys() == load_file("a/model.safetensors").keys()
    for name, tensor in load_file("a/model.safetensors").items():
        assert torch.equal(merged[name], tensor), name


def words_of(folder: Path, words: list[str]) -> None:
    """A tokenizer of these words."""
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_each_added_a_token_of_their_own(shelf):
    """The rows of new tokens lie in the adapters' files, under one id in both."""
    tokenizer = trained("BPE", "a")
    save(shelf / "base", tokenizer, "llama", "causal-lm", 1)
    rows = {}
    for seed, word in enumerate(("<left>", "<right>")):
        own = AutoTokenizer.from_pretrained("base")
        own.add_tokens([word])
        model = AutoModelForCausalLM.from_pretrained("base")
        model.resize_token_embeddings(len(own))
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(word.strip("<>"))
        own.save_pretrained(word.strip("<>"))
        rows[word] = model.get_input_embeddings().weight[own.convert_tokens_to_ids(word)].detach().clone()
    hf_llfc.merge(["base+left", "base+right"], out="out", tokenizer_source="union")
    union = vocabulary("out")
    words = load_file("out/model.safetensors")["model.embed_tokens.weight"]
    base = load_file("base/model.safetensors")["model.embed_tokens.weight"]
    assert len(words) == len(base) + 2 == len(union)
    assert torch.equal(words[: len(base)], base)
    for word, row in rows.items():
        assert torch.equal(words[union[word]], row)
