"""Graphs that a generator got wrong once: vLLM 0.33's, or an earlier state of this one."""

from __future__ import annotations

import enum
import math
import operator
from typing import Any

import pytest
import torch
from codegen_cases import Opaque, Point, check, compiled, graph_module, record
from torch import fx
from torch.distributed.tensor.placement_types import Replicate, Shard

from stitchcache.artifact.unpickle import register_const_type
from stitchcache.codegen.generate import generate_execution_code

CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {}


@register_const_type
class Mode(enum.IntEnum):
    FAST = 1
    SLOW = 2


class Word(str):
    pass


def case(*inputs: Any) -> Any:
    """Register a graph, to be compared with the interpreter on these inputs."""

    def add(build: Any) -> Any:
        CASES[build.__name__] = (build, inputs)
        return build

    return add


def _argument(value: Any, name: str) -> None:
    """A function of the user's that gets ``value``."""

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        graph.output(graph.call_function(record, (x, value), {"k": [value, {"v": value}]}))

    CASES[f"argument {name}"] = (build, (torch.ones(2),))


# Trap 11 of what vLLM's generator fails on: names that repr gives and source does not have.
_argument(float("inf"), "inf")
_argument(-float("inf"), "-inf")
_argument(float("nan"), "nan")
_argument(Shard(0), "Shard")
_argument(Replicate(), "Replicate")
_argument(torch.device("cpu"), "device")
_argument(Mode.SLOW, "IntEnum")
# And its relatives.
_argument(-0.0, "-0.0")
_argument(1e300, "1e300")
_argument(5e-324, "smallest float")
_argument(10**5000, "int of 5000 digits")
_argument(-(2**200), "negative huge int")
_argument(complex(-0.0, math.inf), "complex")
_argument(complex(1, 2), "plain complex")
_argument(b"\x00\xff'\"", "bytes")
_argument("quo'te\"s\n\\ \ud800 \0 é ﬁ", "string")
_argument(Word("word"), "str subclass")
_argument(True, "bool")
_argument(None, "None")
_argument(..., "Ellipsis")
_argument(NotImplemented, "NotImplemented")
_argument(torch.float16, "dtype")
_argument(torch.strided, "layout")
_argument(torch.channels_last, "memory_format")
_argument(torch.Size([2, 3]), "Size")
_argument(range(1, 9, 2), "range")
_argument(slice(1, None, -2), "slice")
_argument(Point(1, Point(float("inf"), [])), "namedtuple")
_argument({None: 1, (1, torch.float32): 2, Mode.FAST: 3, 2.5: 4, "k'": 5, True: 6}, "dict keys")
_argument(frozenset({1}), "frozenset")
_argument((), "empty tuple")
_argument(((),), "tuple of one empty tuple")
_argument([[[[1]]], ({},)], "nested")
_argument(torch.ops.aten.add.Tensor, "overload")
_argument(torch.nn.functional.relu, "function")
_argument(int, "class")
_argument(Point, "namedtuple class")
_argument(operator.add, "operator function")


@case(torch.arange(12.0).reshape(3, 4), 2)
def slice_holding_a_node(graph: fx.Graph) -> None:
    x, n = graph.placeholder("x"), graph.placeholder("n")
    graph.call_function(operator.setitem, (x, (slice(None, n), slice(n, None, 1)), 7.0))
    part = graph.call_function(operator.getitem, (x, (slice(None, n), None, Ellipsis, slice(n, None, 1))))
    graph.output((part, graph.call_function(record, (slice(n, x, None),))))


@case({"k": [1, {"z": 3.5}], ("a", 1): 4}, "k")
def getitem_with_any_index(graph: fx.Graph) -> None:
    x, key = graph.placeholder("x"), graph.placeholder("key")
    by_string = graph.call_function(operator.getitem, (x, "k"))
    by_tuple = graph.call_function(operator.getitem, (x, ("a", 1)))
    by_node = graph.call_function(operator.getitem, (x, key))
    negative = graph.call_function(operator.getitem, (by_node, -1))
    graph.output([by_string, by_tuple, graph.call_function(operator.getitem, (negative, "z"))])


@case(torch.arange(6.0).reshape(2, 3))
def call_method(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    y = graph.call_method("transpose", (x,), {"dim0": 0, "dim1": 1})
    graph.call_method("add_", (y, 1))
    upper = graph.call_method("upper", ("abc",))
    number = graph.call_method("bit_length", (5,))
    graph.output(
        (y, upper, number, graph.call_method("__getitem__", (x, 0)), graph.call_method("index", ([1, x], 1)))
    )


@case(7)
def math_as_target(graph: fx.Graph) -> None:
    n = graph.placeholder("n")
    half = graph.call_function(operator.truediv, (n, 2))
    graph.output((graph.call_function(math.floor, (half,)), graph.call_function(math.ceil, (half,))))


@case(3, 4)
def operators(graph: fx.Graph) -> None:
    a, b = graph.placeholder("a"), graph.placeholder("b")
    names = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor"]
    names += ["lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge"]
    functions = [getattr(operator, name) for name in names]
    results = [graph.call_function(f, (a, b)) for f in functions]
    results += [graph.call_function(f, (-2, b)) for f in functions if f is not operator.truediv]
    results += [graph.call_function(operator.neg, (a,)), graph.call_function(operator.is_, (a, b))]
    graph.output(results)


@case(3)
def operator_between_literals(graph: fx.Graph) -> None:
    a = graph.placeholder("a")
    power = graph.call_function(operator.pow, (-2, 2))
    item = graph.call_function(operator.getitem, ((4, 5), 1))
    item_by_node = graph.call_function(operator.getitem, ([4, 5, 6, 7], a))
    graph.output((power, item, item_by_node, graph.call_function(operator.add, ([a], [1]))))


@case(torch.ones(2, 3))
def builtins_as_target(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    n = graph.call_function(len, (x,))
    shape = graph.call_function(getattr, (x, "shape"))
    fallback = graph.call_function(getattr, (x, "nothing", n))
    hidden = graph.call_function(getattr, (x, "_version"))
    biggest = graph.call_function(max, (n, 1))
    graph.output((n, shape, fallback, hidden, biggest, graph.call_function(isinstance, (x, torch.Tensor))))


@case(torch.full((2, 2), 2.0))
def methods_of_classes_as_target(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    y = graph.call_function(torch.Tensor.add_, (x, 1))
    z = graph.call_function(torch.Tensor.__mul__, (y, 3))
    graph.output(
        (
            y,
            graph.call_function(torch.Tensor.to, (z, torch.float64)),
            graph.call_function(torch.Tensor.sum, (z,)),
        )
    )


@case(torch.full((2, 2), 2.0))
def torch_functions_as_target(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    functions = [torch.relu, torch.nn.functional.gelu, torch.linalg.inv, torch.special.expit, torch.fft.fft]
    functions += [torch.einsum, torch.ops.aten.relu, torch.ops.aten.relu.default, torch._C._nn.gelu]
    functions.append(torch.nn.functional.softmax)
    matrix = graph.call_function(torch.add, (x, graph.call_function(torch.eye, (2,))))
    results = [
        graph.call_function(f, ("ij->ji", matrix) if f is torch.einsum else (matrix,))
        if f is not torch.nn.functional.softmax
        else graph.call_function(f, (matrix,), {"dim": -1})
        for f in functions
    ]
    graph.output(results)


@case(torch.tensor([1, 0]), torch.tensor([1, 1]))
def op_named_like_a_dunder(graph: fx.Graph) -> None:
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(torch.ops.aten.__and__.Tensor, (x, y)))


@case(torch.ones(2, 3))
def keyword_that_is_no_identifier(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    kwargs = {"a": 1, "class": x, "b-c": 2, "d": 3, "__debug__": 4, "é": 5, "": 6}
    graph.output(graph.call_function(record, (), kwargs))


@case(1, 2, 3, 4, 5, 6, 7, 8)
def names_that_mean_something(graph: fx.Graph) -> None:
    wanted = ["class", "max", "torch", "bind", "op_0", "const_0", "_", "execution_fn"]
    nodes = [graph.placeholder(name) for name in wanted]
    total = graph.call_function(max, tuple(nodes))
    more = graph.create_node("call_function", record, (total, slice(*nodes[:2]), float("inf")), name="slice")
    again = graph.create_node("call_function", record, (more, nodes[-1]), name="getattr")
    graph.output((again, nodes))


@case()
def zero_placeholders(graph: fx.Graph) -> None:
    graph.output((graph.call_function(torch.ones, (2,)), 3))


@case(1)
def output_none(graph: fx.Graph) -> None:
    graph.placeholder("x")
    graph.output(None)


@case(1)
def output_of_any_pytree(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    graph.output({"a": [x, (x, {"b": None})], "p": Point(x, slice(x, None)), 3: (x,)})


@case(torch.ones(2))
def results_nobody_uses(graph: fx.Graph) -> None:
    x, y = graph.placeholder("x"), graph.placeholder("unused", default_value=None)
    graph.call_function(torch.ops.aten.add_.Tensor, (x, 1))
    graph.call_function(operator.getitem, (x, 0))
    graph.call_method("sum", (x,))
    graph.call_function(torch.max, (x, 0))
    graph.output(x)
    del y


@case(torch.arange(6.0).reshape(2, 3), 1)
def indices_inside_indices(graph: fx.Graph) -> None:
    # The inner tuple keeps its brackets: it picks rows, and two plain numbers pick one element.
    x, n = graph.placeholder("x"), graph.placeholder("n")
    indices: list[Any] = [((0, 1), n), ((0, n),), (slice(None, n), [0, n]), (), slice(n, None, 2), None]
    graph.output([graph.call_function(operator.getitem, (x, index)) for index in indices])


@case(torch.arange(6.0).reshape(2, 3))
def tuple_result_with_some_items_used(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    # Schema says two results; one is used twice, the other never.
    best = graph.call_function(torch.ops.aten.max.dim, (x, 1))
    values = [graph.call_function(operator.getitem, (best, i)) for i in (0, 0)]
    last = graph.call_function(operator.getitem, (graph.call_function(torch.ops.aten.max.dim, (x, 0)), -1))
    whole = graph.call_function(torch.ops.aten.max.dim, (x, 0))
    item = graph.call_function(operator.getitem, (whole, 1))
    # A list may be longer than what is taken from it, and a tensor has items too.
    parts = graph.call_function(torch.ops.aten.split.Tensor, (x, 1, 1))
    some = [graph.call_function(operator.getitem, (parts, i)) for i in (0, 1)]
    rows = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output(
        (values, last, whole, item, some, [graph.call_function(operator.getitem, (rows, i)) for i in (0, 1)])
    )


@case(torch.arange(6.0).reshape(2, 3))
def sizes(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    rows = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    step = graph.call_function(torch.ops.aten.sym_stride.int, (x, 0))
    count = graph.call_function(torch.ops.aten.sym_numel.default, (x,))
    by_keyword = graph.call_function(torch.ops.aten.sym_size.int, (x,), {"dim": 1})
    graph.output((rows, step, count, by_keyword))


@case(torch.ones(2), 5)
def thousands_of_values_alive(graph: fx.Graph) -> None:
    x, n = graph.placeholder("x"), graph.placeholder("n")
    values = [graph.call_function(operator.add, (n, i)) for i in range(700)]
    functions = [graph.call_function(record, tuple(values))]
    graph.output((functions, values, x))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_interpreter(name: str) -> None:
    build, inputs = CASES[name]
    check(graph_module(build), *inputs)


def test_a_thousand_placeholders() -> None:
    def build(graph: fx.Graph) -> None:
        graph.output(list(reversed([graph.placeholder(f"p{i}") for i in range(1000)])))

    gm = graph_module(build)
    check(gm, *range(1000))
    assert compiled(gm)(**{f"p{i}": i for i in range(1000)})[0] == 999


def test_placeholders_keep_their_names_for_keyword_calls() -> None:
    def build(graph: fx.Graph) -> None:
        names = ["input", "max", "L_x_", "self", "slice"]
        nodes = [graph.placeholder(name) for name in names]
        graph.output((graph.call_function(max, (1, 2)), nodes))

    result = compiled(graph_module(build))(slice=5, self=4, L_x_=3, max=2, input=1)
    assert result == (2, [1, 2, 3, 4, 5])


def test_defaults_and_starred_placeholders() -> None:
    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        y = graph.placeholder("y", default_value=float("inf"))
        z = graph.placeholder("z", default_value=slice(1, 2))
        args, w, kwargs = (
            graph.placeholder("*args"),
            graph.placeholder("w", default_value=None),
            graph.placeholder("**kw"),
        )
        graph.output((x, y, z, args, w, kwargs))

    run = compiled(graph_module(build))
    assert run(1) == (1, float("inf"), slice(1, 2), (), None, {})
    assert run(1, 2, 3, 4, 5, w=6, v=7) == (1, 2, 3, (4, 5), 6, {"v": 7})


def test_unhashable_and_unequal_constants_are_kept_apart_by_identity() -> None:
    nan, other, array = float("nan"), float("nan"), torch.ones(2)

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        graph.output(graph.call_function(record, (x, nan, nan, other, array, array, {1, 2})))

    code, _, consts = generate_execution_code(graph_module(build))
    assert [type(c) for c in consts[1:]] == [float, float, torch.Tensor, set]
    assert consts[0] is record
    assert consts[1] is nan
    assert consts[2] is other
    assert code.count("const_1") == 3
    check(graph_module(build), 1)


def test_constants_equal_but_of_other_types_stay_apart() -> None:
    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        graph.output(
            graph.call_function(record, (x, Mode.FAST, 1, True, 1.0, torch.device("cpu"), Word("a"), "a"))
        )

    check(graph_module(build), 1)


@pytest.mark.parametrize("indices", [(0, 1), (0,), (1,), (0, 2), (2, 2, 0), (-1, 0), ()])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("boxed", [True, False])
def test_tuple_results_of_submodules(indices: tuple[int, ...], known: bool, boxed: bool) -> None:
    root = torch.nn.Module()
    root.piece = Opaque(lambda x: (x + 1, x + 2, x + 3))

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        result = graph.call_module("piece", (x,))
        if known:
            result.meta["val"] = (None, None, None)
        graph.output([graph.call_function(operator.getitem, (result, i)) for i in indices])

    gm = graph_module(build, root)
    check(gm, 1, boxed=["piece"] if boxed else ())
    code = generate_execution_code(gm)[0]
    if known and len(set(indices)) > 1:
        assert "[0]" not in code


def test_a_tuple_that_is_used_whole_is_not_unpacked() -> None:
    root = torch.nn.Module()
    root.piece = Opaque(lambda x: (x + 1, x + 2))

    def build(graph: fx.Graph) -> None:
        result = graph.call_module("piece", (graph.placeholder("x"),))
        result.meta["val"] = (None, None)
        graph.output((graph.call_function(operator.getitem, (result, 0)), result))

    check(graph_module(build, root), 1, boxed=["piece"])


def test_a_submodule_named_like_a_builtin_does_not_hide_it() -> None:
    root = torch.nn.Module()
    root.max = Opaque(lambda x: x + 1)

    def build(graph: fx.Graph) -> None:
        x = graph.call_module("max", (graph.placeholder("x"),))
        graph.output(graph.call_function(max, (x, 5)))

    check(graph_module(build, root), 1)
