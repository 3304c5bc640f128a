"""Symbolic sizes: canonical names, printed relations, and what sizes are for given symbols."""

import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim

from stitchcache.errors import SplitError
from stitchcache.graph.symbols import (
    SymbolNames,
    bounds,
    evaluate,
    finite,
    guards,
    shape_environment,
    solve,
    structure,
    text,
)

a, b, c = (sympy.Symbol(name, integer=True, positive=True) for name in ("s77", "s12", "u3"))


def captured(shapes, dims):
    class Two(nn.Module):
        def forward(self, x, y):
            return x.sum() + y.sum()

    args = tuple(torch.randn(shape) for shape in shapes)
    return torch.export.export(Two(), args, dynamic_shapes=dims, strict=False).graph_module


def test_names_are_given_in_order_of_appearance():
    names = SymbolNames()
    assert str(names.rename(a + 1)) == "s0 + 1"
    assert str(names.rename(2 * b)) == "2*s1"
    assert str(names.rename(a * b)) == "s0*s1"
    assert dict(names.items()) == {a: "s0", b: "s1"}
    assert a in names
    assert c not in names


def test_torchs_names_do_not_show_in_an_expression_of_several_new_symbols():
    def named(first, second):
        return structure(SymbolNames().rename(first + 2 * second))

    assert named(a, b) == named(b, a) == named(a, c)


def test_assumptions_of_a_symbol_are_kept():
    plain = sympy.Symbol("q", integer=True)
    (renamed,) = SymbolNames().rename(plain + 0).free_symbols
    assert renamed.is_integer
    assert not renamed.is_positive


@pytest.mark.parametrize(
    "expr",
    [a + 1, 2 * a - b, a**2, sympy.Le(a, 2 * b), sympy.And(a > 1, b < 9), sympy.Ne(sympy.Mod(a, 8), 0),
     sympy.Max(a, b), sympy.Min(a, 4), sympy.Not(sympy.Eq(a, b)), sympy.Or(a > 5, sympy.Eq(b, 2))],
)  # fmt: skip
def test_printed_expressions_compute_what_the_expression_does(expr):
    for first in (1, 2, 8, 9):
        for second in (1, 2, 5, 30):
            want = expr.subs({a: first, b: second})
            want = bool(want) if want in (sympy.true, sympy.false) else int(want)
            assert eval(text(expr), {"s77": first, "s12": second, "max": max, "min": min}) == want


def test_an_expression_that_a_call_cannot_check_is_refused():
    with pytest.raises(SplitError, match="sin"):
        text(sympy.sin(a))


def test_sizes_for_given_symbols():
    assert evaluate(3, {}) == 3
    assert evaluate(2 * a + 1, {a: 4}) == 9
    assert evaluate(a + b, {a: 4}) is None
    assert evaluate(a - 5, {a: 4}) is None, "no size is below 0"


def test_symbols_are_solved_from_tensors():
    n = Dim("n", min=2, max=64)
    gm = captured([(4, 3), (8,)], [{0: n}, {0: 2 * n}])
    fakes = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    (symbol,) = solve([(fakes[0], torch.empty(7, 3)), (fakes[1], torch.empty(14)), (3, 4)]).keys()
    assert solve([(fakes[0], torch.empty(7, 3))]) == {symbol: 7}
    assert evaluate(fakes[1].shape[0], {symbol: 7}) == 14


def test_ranges_and_relations_of_a_capture():
    n, m = Dim("n", min=2, max=64), Dim("m", min=3)
    gm = captured([(4, 3), (8,)], [{0: n}, {0: m}])
    environment = shape_environment(gm.graph)
    fakes = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    names = SymbolNames()
    assert names.size(fakes[0].shape[0]) == "s0"
    assert names.size(fakes[0].shape[1]) == 3
    assert names.size(fakes[1].shape[0]) == "s1"
    first, second = (symbol for symbol, _ in names.items())
    assert bounds(environment, first) == (2, 64)
    assert bounds(environment, second) == (3, None)
    assert all("s77" not in guard for guard in guards(environment, names))
    assert shape_environment(captured([(4,), (4,)], None).graph) is None


@pytest.mark.parametrize(("bound", "found"), [(5, 5), (sympy.Integer(7), 7), (sympy.oo, None), (2**62, None)])
def test_infinite_bounds_are_none(bound, found):
    assert finite(bound) == found
