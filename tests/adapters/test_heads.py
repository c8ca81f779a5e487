"""The axis expressions of attention: what its projections give out."""

import pytest

from hf_llfc.adapters.blocks import heads_of


@pytest.mark.parametrize(
    ("arguments", "queries", "keys", "values", "output", "by_head"),
    [
        (
            {"heads": 6},
            "(heads.{i} head_dim)",
            "(heads.{i} head_dim)",
            "(heads.{i} value_dim.{i}[heads])",
            "(heads.{i} value_dim.{i}[heads])",
            "(heads.{i} head_dim + head_dim + value_dim.{i}[heads])",
        ),
        (
            {"heads": 6, "kv_heads": 2, "free_channels": True},
            "(kv.{i} q.{i}[kv] head_dim.{i}[kv])",
            "(kv.{i} head_dim.{i}[kv])",
            "(kv.{i} value_dim.{i}[kv])",
            "(kv.{i} q.{i}[kv] value_dim.{i}[kv])",
            "(kv.{i} (q.{i}[kv] head_dim.{i}[kv]) + head_dim.{i}[kv] + value_dim.{i}[kv])",
        ),
        (
            {"heads": 6, "kv_heads": 1},
            "(q.{i} head_dim)",
            "head_dim",
            "value_dim.{i}",
            "(q.{i} value_dim.{i})",
            "(q.{i} head_dim) + head_dim + value_dim.{i}",
        ),
        (
            {"heads": 1, "rotary_dim": 6},
            "rotary + head_dim.{i}",
            "rotary + head_dim.{i}",
            "value_dim.{i}",
            "value_dim.{i}",
            "rotary + head_dim.{i} + rotary + head_dim.{i} + value_dim.{i}",
        ),
        (
            {"heads": 6, "kv_heads": 2, "rotary_dim": 6},
            "(kv.{i} q.{i}[kv] rotary + head_dim.{i}[kv])",
            "(kv.{i} rotary + head_dim.{i}[kv])",
            "(kv.{i} value_dim.{i}[kv])",
            "(kv.{i} q.{i}[kv] value_dim.{i}[kv])",
            "(kv.{i} (q.{i}[kv] rotary + head_dim.{i}[kv]) + rotary + head_dim.{i}[kv] + value_dim.{i}[kv])",
        ),
    ],
)
def test_projections(arguments, queries, keys, values, output, by_head):
    heads = heads_of(arguments.pop("heads"), arguments.pop("kv_heads", None), head_dim=8, **arguments)
    assert (heads.queries, heads.keys, heads.values, heads.output) == (queries, keys, values, output)
    assert heads.by_head == by_head
    assert heads.fused == f"{queries} + {keys} + {values}"


def test_a_rotary_embedding_on_all_channels_leaves_none_to_move():
    heads = heads_of(4, head_dim=8, rotary_dim=8)
    assert heads.keys == "(heads.{i} rotary)"
    assert heads.sizes == {"heads": 4, "rotary": 8, "value_dim": 8}
    assert heads.symmetric == ("heads", "value_dim")


def test_some_rotary_channels():
    heads = heads_of(4, head_dim=8, rotary_dim=2)
    assert heads.sizes == {"heads": 4, "rotary": 2, "head_dim": 6, "value_dim": 8}
    assert heads.symmetric == ("heads", "head_dim", "value_dim")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "query_heads", "key_heads"),
    [
        (6, None, "heads.{i}", "heads.{i}"),
        (6, 2, "(kv.{i} q.{i}[kv])", "kv.{i}"),
        (6, 1, "q.{i}", "1"),
        (1, None, "1", "1"),
    ],
)
def test_one_number_a_head(heads, kv_heads, query_heads, key_heads):
    found = heads_of(heads, kv_heads, head_dim=8)
    assert (found.query_heads, found.key_heads) == (query_heads, key_heads)


def test_a_gate_after_each_query():
    assert heads_of(6, 2, head_dim=8).queries_and_gates == "(kv.{i} q.{i}[kv] head_dim + value_dim.{i}[kv])"
