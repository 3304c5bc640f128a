"""Views of an entry and words for people, without a process."""

from __future__ import annotations

import pytest

from stitchcache.cli.layout import Column, fit
from stitchcache.cli.words import age_text, count_text, printable, seconds_text, short_length, size_text
from stitchcache.report.contract import contiguous, tensor_text
from stitchcache.report.trees import tree_text
from stitchcache.types import TensorSpec


def test_trees_are_those_of_torch():
    torch = pytest.importorskip("torch")
    from collections import OrderedDict, namedtuple

    from stitchcache.torchside import tree

    Pair = namedtuple("Pair", "a b")
    torch.utils._pytree._register_namedtuple(Pair, serialized_type_name="tests.views.Pair")
    cases = [
        (1, "*"),
        ((1,), "(*,)"),
        ([1, (2, 3)], "[*, (*, *)]"),
        ({"b": 1, "a": [2]}, "{'b': *, 'a': [*]}"),
        (OrderedDict(z=1), "OrderedDict({'z': *})"),
        ((), "()"),
    ]
    for value, expected in cases:
        assert tree_text(tree.dumps(tree.flatten(value)[1])) == expected
    assert tree_text(tree.dumps(tree.flatten(Pair(1, [2]))[1])) == "Pair(*, [*])"


def test_a_tree_of_another_kind_is_shown_as_it_is():
    assert tree_text("[2, 5]") == "[2, 5]"
    assert tree_text("what") == "what"
    assert len(tree_text("x" * 9999)) == 2000


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((), ()),
        ((2, 3), (3, 1)),
        (("s0", 384), (384, 1)),
        ((4, "s0"), ("s0", 1)),
        (("s0", "s1", 3), ("3*s1", 3, 1)),
        ((2, "s0 + 1"), ("s0 + 1", 1)),
        ((2, 5, "s0 + 1"), None),
        (("s0", "s1", "s2"), None),
    ],
)
def test_usual_strides(shape, strides):
    assert contiguous(shape) == strides


def test_unusual_strides_are_told():
    assert tensor_text(_tensor((2, 3), (3, 1))) == "float32[2, 3] cpu"
    assert tensor_text(_tensor((2, 3), (1, 2))) == "float32[2, 3] cpu strides (1, 2)"
    assert tensor_text(_tensor(("s0", 3), (3, 1))) == "float32[s0, 3] cpu"
    assert tensor_text(_tensor((), ())) == "float32[] cpu"


def _tensor(shape, stride) -> TensorSpec:
    return TensorSpec(dtype="float32", device="cpu", shape=shape, stride=stride)


def test_words():
    assert [size_text(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
    assert [seconds_text(s) for s in (0.00025, 0.0123, 4.21, 185.4)] == [
        "250 us",
        "12 ms",
        "4.2 s",
        "3 min 5 s",
    ]
    assert [age_text(t, now=1e9) for t in (0, 1e9 - 5, 1e9 - 300, 1e9 - 7300, 1e9 - 1e6, 1e9 + 5)] == [
        "unknown",
        "just now",
        "5 min ago",
        "2 h ago",
        "11 d ago",
        "just now",
    ]
    assert [count_text(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
    assert printable("a\tb\x1b\u200eü") == "a\\tb\\x1b\\u200eü"
    assert short_length([]) == 12
    assert short_length(["a" * 64, "a" * 20 + "b" * 44]) == 21
    assert short_length(["a" * 64, "a" * 64]) == 12


COLUMNS = [Column("A"), Column("B", flexible=True), Column("C", optional=True), Column("D", optional=True)]
ROW = ["a" * 10, "b" * 40, "c" * 10, "d" * 10]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (200, [(0, 10), (1, 40), (2, 10), (3, 10)]),
        (76, [(0, 10), (1, 40), (2, 10), (3, 10)]),
        (60, [(0, 10), (1, 24), (2, 10), (3, 10)]),
        (47, [(0, 10), (1, 23), (2, 10)]),
        (30, [(0, 10), (1, 18)]),
        (5, [(0, 10), (1, 12)]),
    ],
)
def test_columns_fit_a_terminal(width, expected):
    assert fit(COLUMNS, [ROW], width) == expected


def test_columns_of_an_empty_table():
    assert fit(COLUMNS, [], 80) == [(0, 1), (1, 1), (2, 1), (3, 1)]
