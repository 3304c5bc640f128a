"""An entry in words, without a process."""

from __future__ import annotations

import pytest

from stitchcache.report.entry import tensor_text, tree_text
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


def test_unusual_strides_are_told():
    assert tensor_text(_tensor((2, 3), (3, 1))) == "float32[2, 3] cpu"
    assert tensor_text(_tensor((2, 3), (1, 2))) == "float32[2, 3] cpu strides (1, 2)"
    assert tensor_text(_tensor(("s0", 3), (3, 1))) == "float32[s0, 3] cpu"
    assert tensor_text(_tensor((), ())) == "float32[] cpu"
    assert tensor_text(_tensor(("s0", "s1", 3), ("(3 * s1)", 3, 1))) == "float32[s0, s1, 3] cpu"


def _tensor(shape, stride) -> TensorSpec:
    return TensorSpec(dtype="float32", device="cpu", shape=shape, stride=stride)
