"""Input as strangers write it: valid content with anything changed, and anything at all."""

import copy
from typing import Any

from hypothesis import strategies as st

ODD_NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("inf"), float("nan")])
ODD_TEXTS = st.sampled_from(
    ["", " ", "\0", "\ud800", "../x", "/etc/passwd", "..\\x", "C:x", "a" * 500, "*a", "&a", "!!python/object:x", "${x}"]
)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | ODD_NUMBERS | ODD_TEXTS
ANYTHING = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def changed(draw, value: Any, most: int = 3) -> Any:
    """JSON values with up to `most` places replaced, removed, doubled or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(places(value)) or [()]))
        if not path:
            return draw(ANYTHING)
        *parents, last = path
        holder = value
        for key in parents:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "double"]))
        if action == "replace":
            holder[last] = draw(ANYTHING)
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[draw(st.text(max_size=6) | ODD_TEXTS)] = copy.deepcopy(holder[last])
    return value


def places(value: Any, path: tuple = ()):
    """The path to every place of JSON values."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, (*path, key))
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from places(entry, (*path, place))


@st.composite
def damaged(draw, content: bytes, most: int = 4) -> bytes:
    """Bytes with some overwritten, cut off, inserted or doubled."""
    for _ in range(draw(st.integers(1, most))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 16)))
        content = content[:begin] + draw(st.binary(max_size=16)) + content[end:]
        if draw(st.booleans()):
            content = content[: draw(st.integers(0, len(content)))]
    return content


WRAPPERS = ("_orig_mod.", "module.", "module._orig_mod.", "base_model.model.", "_fsdp_wrapped_module.", "student.")
SPARE = ("mtp.fc.weight", "score.weight", "cls.seq_relationship.weight", "probe", "model.rotary_emb.inv_freq")
KEYS = st.sampled_from(
    ["unsloth_version", "tokenizer_class", "rope_parameters", "quantization_config", "id2label", "num_labels",
     "tie_word_embeddings", "attention_bias", "vocab_size", "sliding_window", "layer_types", "architectures", "note"]
)  # fmt: skip


def steps_to_files(names: list[str]) -> st.SearchStrategy[list[tuple[str, Any]]]:
    """What may have become of a saved model's files: tensors gone, added or renamed, keys of the config changed.

    Args:
        names: Its tensors.
    """
    part = st.sampled_from(names) | st.sampled_from(["lm_head", ".bias", "layers.0.", "norm", "_proj"])
    step = st.one_of(
        st.tuples(st.just("drop"), part),
        st.tuples(st.just("add"), st.sampled_from(SPARE)),
        st.tuples(st.just("double"), st.sampled_from(names)),
        st.tuples(st.just("wrap"), st.sampled_from(WRAPPERS)),
        st.tuples(st.just("rename"), st.tuples(part, st.sampled_from(["gamma", "", "model.", "x"]))),
        st.tuples(st.just("integers"), st.sampled_from(names)),
        st.tuples(st.just("config"), st.tuples(KEYS, ATOMS | st.just({"quant_method": "gptq"}) | st.just({"0": "a"}))),
        st.tuples(st.just("shards"), st.none()),
    )
    return st.lists(step, max_size=3)
