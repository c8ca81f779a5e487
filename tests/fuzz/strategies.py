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
