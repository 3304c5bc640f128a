"""Size expressions from an entry: arithmetic passes, anything else does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from stitchcache.errors import EntryFormatError
from stitchcache.runtime.expressions import check_expression, evaluator, names_in

SYMBOLS = {"s0", "s1"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("s0", 6),
        ("(2 * s0 + 1)", 13),
        ("(s0 // 4)", 1),
        ("max(s0, s1)", 6),
        ("min(s0, s1)", 4),
        ("(s0 % s1)", 2),
        ("(s0 ** 2)", 36),
        ("(s0 == 6 and not s1 > 4)", 1),
        ("-s0", -6),
    ],
)
def test_arithmetic(text, value):
    assert evaluator(check_expression(text, SYMBOLS, "here"))({"s0": 6, "s1": 4}) == value


@pytest.mark.parametrize(
    "text",
    [
        "s2",
        "__import__('os')",
        "s0.__class__",
        "open('x')",
        "(lambda: 1)()",
        "[s0 for s0 in s1]",
        "max(s0, key=s1)",
        "max()",
        "'text'",
        "1.5",
        "s0 if s1 else 3",
        "s0 := 3",
        "s0; s1",
        "",
        "1 < s0 < 3",
        "9 ** s0",
        "(" * 3000 + "s0" + ")" * 3000,
        "f'{s0}'",
        "max",
        "s0 + min",
        "9**999999999",
        "((9**99)**99)**99",
        "s0**99",
        "(s0**9)**9",
        "s0**-1",
        "9" * 3000,
        "-" * 1900 + "s0",
        "s0 << 3",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(EntryFormatError, match=r"spec\.here"):
        check_expression(text, SYMBOLS, "spec.here")


@pytest.mark.parametrize(
    "text", ["9**999999999", "s0 // (s0 - s0)", "s0 % 0", "s9 + 1", "import os", "'a' * 9"]
)
def test_what_nobody_checked_is_not_evaluated(text):
    with pytest.raises(EntryFormatError):
        evaluator(text)({"s0": 6})


@st.composite
def expressions(draw, depth=3):
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["s0", "s1", "1", "7", "12"]))
    left, right = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    form = draw(
        st.sampled_from(["({} + {})", "({} - {})", "({} * {})", "max({}, {})", "min({}, {})", "({} == {})"])
    )
    return form.format(left, right)


@settings(deadline=None)
@given(expressions(), st.integers(1, 50), st.integers(1, 50))
def test_evaluation_is_pythons(text, s0, s1):
    check_expression(text, SYMBOLS, "here")
    assert names_in(text) <= SYMBOLS
    assert evaluator(text)({"s0": s0, "s1": s1}) == int(eval(text, {"s0": s0, "s1": s1}))
