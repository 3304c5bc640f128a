"""Steps of stitching code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stitchcache.report.steps import steps_of
from stitchcache.types import BlobRef, PieceRef, Variant

CODE = '''\
import torch
import operator


def bind(__submods__, __consts__):
    weight, submod_0, submod_2, submod_4 = __submods__
    op_attention = torch.ops.demo.attention.default

    def execution_fn(ids):
        """Run graph HASH: 3 pieces."""
        (q, out) = submod_0([weight, ids])
        del ids
        op_attention(q, out, 'layers.0')
        del q
        (q_1, out_1) = submod_2([out, weight])
        del out
        op_attention(q_1, out_1, 'layers.1')
        del q_1
        (y, _) = submod_4([out_1])
        del out_1, _
        z = y.permute(0, 1)
        del y
        return (z,)

    return execution_fn
'''


def variant(code: str, *names: str) -> Variant:
    blob = BlobRef(digest="0" * 64, size=1)
    pieces = tuple(
        PieceRef(name=name, key="ab"[name == "submod_4"] * 64, backend="aoti", blob=blob)
        for name in names
        if name.startswith("submod")
    )
    return Variant(size_range=None, code=code, submod_names=names, consts=None, pieces=pieces)


def test_what_is_made_is_what_comments_say():
    said = CODE.replace("([weight, ids])", "([weight, ids])  # 2 x float32[s0, 64]")
    said = said.replace("y.permute(0, 1)", "y.permute('# int8[9]')  # int8[(s0 + 1)], \u00e9")
    steps = steps_of(variant(said, "bound.head.weight", "submod_0", "submod_2", "submod_4"))
    assert [step.said for step in steps if step.said] == ["2 x float32[s0, 64]", "int8[(s0 + 1)], \u00e9"]
    assert [step.frees for step in steps][:3] == [[], ["ids"], ["q"]]


def test_what_a_step_reads_and_makes():
    steps = steps_of(variant(CODE, "bound.head.weight", "submod_0", "submod_2", "submod_4"))
    assert [(step.kind, step.name) for step in steps] == [
        ("input", "ids"),
        ("piece", "submod_0"),
        ("op", "torch.ops.demo.attention.default"),
        ("piece", "submod_2"),
        ("op", "torch.ops.demo.attention.default"),
        ("piece", "submod_4"),
        ("op", ".permute"),
        ("output", "returns"),
    ]
    first, attention, second = steps[1:4]
    assert (first.reads, first.weights, first.makes) == ([(0, "ids")], ["head.weight"], ["q", "out"])
    assert first.first == 11
    assert attention.reads == [(1, "q"), (1, "out")]
    # The op returned nothing: it wrote into ``out``, so the next piece waits for it.
    assert second.reads == [(2, "out")]
    assert steps[5].makes == ["y"]
    assert steps[-1].reads == [(6, "z")]


def test_what_repeats_is_folded():
    steps = steps_of(variant(CODE, "bound.head.weight", "submod_0", "submod_2", "submod_4"))
    assert [step.fold for step in steps] == [None, (1, 2), (2, 2), (1, 2), (2, 2), None, None, None]


def test_code_of_vllm():
    for case in json.loads((Path(__file__).parents[1] / "data/vllm_code/cases.json").read_text()):
        steps = steps_of(variant(case["code"], "submod_0", "submod_1", "submod_2"))
        assert steps[0].kind == "input"
        assert steps[-1].kind == "output"


def test_a_deep_chain_is_read():
    lines = [f"        x = submod_0([x])  # {at}" for at in range(5000)]
    code = "def bind(s, c):\n    (submod_0,) = __submods__\n    def execution_fn(x):\n"
    steps = steps_of(variant("\n".join([code, *lines, "        return x"]), "submod_0"))
    assert len(steps) == 5002


@pytest.mark.parametrize("code", ["", "x = (", "def f(): pass", "x = " + "-" * 100_000 + "1"])
def test_no_stitching_code(code):
    with pytest.raises((SyntaxError, MemoryError, RecursionError)):
        steps_of(variant(code))
