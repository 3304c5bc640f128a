"""Random graphs over everything that generated code has to cope with, beside the interpreter.

Set STITCHCACHE_FULL=1 for thousands of graphs instead of a few hundred.
"""

from __future__ import annotations

import enum
import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from codegen_cases import Opaque, Point, check, record
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import fx

from stitchcache.artifact.unpickle import register_const_type

EXAMPLES = 4000 if os.environ.get("STITCHCACHE_FULL") else 200
NAMES = [
    "x",
    "y",
    "class",
    "max",
    "torch",
    "op_0",
    "const_0",
    "submod_0",
    "bind",
    "slice",
    "del",
    "_",
    "__a__",
    "p.q",
]
INF = float("inf")
NAN = float("nan")


@register_const_type
class Color(enum.IntEnum):
    RED = 3


class Label(str):
    pass


def add_in_place(x: Any, y: Any) -> Any:
    """A user's function that changes its argument."""
    return x.add_(y)


SCALARS: list[Any] = [0, 1, -1, 2**80, -(10**4400), 0.0, -0.0, 1.5, INF, -INF, NAN, True, None, ..., 1j]
SCALARS += ["text", "\n'\"\0\ud800é", b"\x00\xff", complex(-0.0, INF), Color.RED, Label("label"), int, Point]
SCALARS += [torch.float16, torch.device("cpu"), torch.strided, torch.channels_last, torch.Size([2, 0])]
SCALARS += [torch.ops.aten.add.Tensor, torch.relu, operator.mul, range(2, 9, 3), frozenset([7])]


@dataclass
class Builder:
    """A graph under construction: nodes by what kind of value they have."""

    draw: Any
    depth: int
    root: torch.nn.Module = field(default_factory=torch.nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    tensors: list[fx.Node] = field(default_factory=list)
    numbers: list[fx.Node] = field(default_factory=list)
    anything: list[fx.Node] = field(default_factory=list)
    boxed: list[str] = field(default_factory=list)
    modules: int = 0

    def pick(self, values: list[Any]) -> Any:
        return self.draw(st.sampled_from(values))

    def tensor(self) -> Any:
        return self.pick(self.tensors)

    def number(self) -> Any:
        return (
            self.pick(self.numbers)
            if self.numbers and self.draw(st.booleans())
            else self.draw(st.integers(-3, 9))
        )

    def leaf(self) -> Any:
        nodes = self.tensors + self.numbers + self.anything
        return self.pick(nodes) if nodes and self.draw(st.booleans()) else self.pick(SCALARS)

    def argument(self, depth: int = 2) -> Any:
        kind = self.draw(st.integers(0, 9)) if depth else 0
        if kind < 5:
            return self.leaf()
        items = [self.argument(depth - 1) for _ in range(self.draw(st.integers(0, 3)))]
        if kind == 5:
            return items
        if kind == 6:
            return tuple(items)
        if kind == 7:
            keys = [0, "k", "not an identifier", (1, torch.float16), Color.RED]
            return dict(zip(self.draw(st.permutations(keys)), items, strict=False))
        if kind == 8:
            return slice(*[self.argument(0) for _ in range(3)])
        return Point(self.argument(depth - 1), items)


def call_torch(b: Builder) -> None:
    kind = b.draw(st.integers(0, 6))
    x, y = b.tensor(), b.tensor()
    if kind == 0:
        node = b.graph.call_function(torch.ops.aten.add.Tensor, (x, y), b.pick([{}, {"alpha": 2}]))
    elif kind == 1:
        node = b.graph.call_function(b.pick([torch.relu, torch.nn.functional.gelu, torch.Tensor.abs]), (x,))
    elif kind == 2:
        node = b.graph.call_function(
            b.pick([operator.add, operator.sub, operator.mul, torch.mul]), (x, b.number())
        )
    elif kind == 3:
        node = b.graph.call_method(b.pick(["add", "mul", "__sub__"]), (x, y))
    elif kind == 4:
        node = b.graph.call_function(torch.clamp, (x,), {"max": b.pick([INF, 3.0, NAN])})
    elif kind == 5:
        node = b.graph.call_function(torch.ops.aten.clone, (x,))
    else:
        node = b.graph.call_method("to", (x,), {"dtype": torch.float32})
    b.tensors.append(node)


def change_in_place(b: Builder) -> None:
    target = b.pick([torch.ops.aten.add_.Tensor, torch.Tensor.mul_, add_in_place])
    node = b.graph.call_function(target, (b.tensor(), b.pick([1, 2])))
    if b.draw(st.booleans()):
        b.tensors.append(node)


def set_item(b: Builder) -> None:
    index = b.pick([0, slice(1, None), (slice(None, 2), slice(0, None, 2)), (Ellipsis, -1)])
    b.graph.call_function(operator.setitem, (b.tensor(), index, b.number()))


def get_item(b: Builder) -> None:
    size = b.graph.call_function(torch.ops.aten.sym_size.int, (b.tensor(), 0))
    indices = [
        0,
        -1,
        slice(0, 2),
        (0, slice(None, None, 2)),
        (None, Ellipsis, 1),
        (),
        (slice(None, size), 0),
        [0, 2],
    ]
    b.anything.append(b.graph.call_function(operator.getitem, (b.tensor(), b.pick(indices))))


def number(b: Builder) -> None:
    kind = b.draw(st.integers(0, 4))
    if kind == 0:
        node = b.graph.call_function(torch.ops.aten.sym_size.int, (b.tensor(), b.pick([0, -1])))
    elif kind == 1:
        functions = [
            operator.add,
            operator.sub,
            operator.mul,
            operator.lt,
            operator.eq,
            operator.and_,
            max,
            min,
        ]
        node = b.graph.call_function(b.pick(functions), (b.number(), b.number()))
    elif kind == 2:
        half = b.graph.call_function(operator.truediv, (b.number(), 2))
        node = b.graph.call_function(b.pick([math.floor, round, int]), (half,))
    elif kind == 3:
        node = b.graph.call_method(b.pick(["bit_length", "__neg__"]), (b.number(),))
    else:
        node = b.graph.call_function(torch.sym_max, (b.number(), b.number()))
    b.numbers.append(node)


def observe(b: Builder) -> None:
    """A user's function that shows exactly what it got."""
    kwargs = {b.pick(["a", "class", "b-c", "k"]): b.argument() for _ in range(b.draw(st.integers(0, 2)))}
    args = tuple(b.argument() for _ in range(b.draw(st.integers(0, 3))))
    node = b.graph.call_function(record, args, kwargs)
    if b.draw(st.booleans()):
        b.anything.append(b.graph.call_function(operator.getitem, (node, b.pick([0, 1, 2, -1]))))
    b.anything.append(node)


def several_results(b: Builder) -> None:
    kind = b.draw(st.integers(0, 2))
    if kind == 0:
        node, length = b.graph.call_function(torch.ops.aten.max.dim, (b.tensor(), 0)), 2
    elif kind == 1:
        node, length = b.graph.call_function(torch.ops.aten.split.Tensor, (b.tensor(), 1)), 3
    else:
        node, length = b.graph.call_function(torch.ops.aten.unbind.int, (b.tensor(),)), 3
    take_items(b, node, length, b.anything)


def take_items(b: Builder, node: fx.Node, length: int, where: list[fx.Node]) -> None:
    for index in b.draw(st.lists(st.integers(-length, length - 1), max_size=4)):
        where.append(b.graph.call_function(operator.getitem, (node, index)))
    if b.draw(st.integers(0, 4)) == 0:
        b.anything.append(node)


def call_piece(b: Builder) -> None:
    results = b.draw(st.integers(1, 3))
    name = b.pick([f"submod_{b.modules}", "submod_0", "max"])
    if b.modules and name != f"submod_{b.modules}":
        name = f"again_{b.modules}"
    b.modules += 1
    b.root.add_module(name, Opaque(lambda x, y, *rest: tuple(x + y * i for i in range(results))))
    node = b.graph.call_module(name, (b.tensor(), b.tensor(), b.argument(1)))
    if b.draw(st.booleans()):
        node.meta["val"] = (None,) * results
    if b.draw(st.booleans()) and b.depth == 0:
        b.boxed.append(name)
    take_items(b, node, results, b.tensors)


def call_again(b: Builder) -> None:
    earlier = [
        n for n in b.graph.nodes if n.op == "call_module" and isinstance(getattr(b.root, n.target), Opaque)
    ]
    if earlier:
        node = b.graph.call_module(b.pick(earlier).target, (b.tensor(), b.tensor()))
        b.anything.append(b.graph.call_function(operator.getitem, (node, 0)))


def inline(b: Builder) -> None:
    if b.depth >= 2:
        return
    b.modules += 1
    name = f"inner_{b.modules}"
    inner = Builder(b.draw, b.depth + 1)
    for place in range(2):
        inner.tensors.append(inner.graph.placeholder(b.pick(["x", "a", "max"]) + str(place)))
    inner.numbers.append(inner.graph.placeholder("n", default_value=b.pick([4, 5])))
    fill(inner, b.draw(st.integers(0, 4)))
    result = b.pick([inner.tensor(), (inner.tensor(), inner.tensor()), [inner.tensor(), inner.argument(1)]])
    inner.graph.output(result)
    b.root.add_module(name, module_of(inner))
    node = b.graph.call_module(
        name, (b.tensor(), b.tensor(), *([b.number()] if b.draw(st.booleans()) else []))
    )
    if isinstance(result, fx.Node):
        b.tensors.append(node)
    else:
        take_items(b, node, 2, b.anything)


def attribute(b: Builder) -> None:
    name = b.pick(["weight", "shift", "deep.weight", "plain", "count"])
    node = b.graph.get_attr(name)
    (b.numbers if name == "count" else b.anything if name == "plain" else b.tensors).append(node)


STEPS: list[Callable[[Builder], None]] = [call_torch, call_torch, change_in_place, set_item, get_item, number]
STEPS += [observe, observe, several_results, call_piece, call_piece, call_again, inline, attribute]


def fill(b: Builder, steps: int) -> None:
    for _ in range(steps):
        b.pick(STEPS)(b)


def module_of(b: Builder) -> fx.GraphModule:
    """The module, not recompiled: fx's own printer cannot write every graph here."""
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    for name, module in b.root.named_children():
        gm.add_module(name, module)
    gm.weight = torch.nn.Parameter(torch.full((3, 3), 2.0), requires_grad=False)
    gm.register_buffer("shift", torch.full((3, 3), 0.5))
    gm.deep = torch.nn.Module()
    gm.deep.weight = torch.nn.Parameter(torch.eye(3), requires_grad=False)
    gm.plain, gm.count = {"a": [1, INF]}, 3
    gm._graph = b.graph
    b.graph.owning_module = gm
    return gm


@st.composite
def graphs(draw: st.DrawFn) -> tuple[fx.GraphModule, list[Any], list[str]]:
    b = Builder(draw, 0)
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=6))
    inputs: list[Any] = []
    for place, name in enumerate(names):
        node = b.graph.placeholder(name)
        if place < 2 or draw(st.booleans()):
            b.tensors.append(node)
            inputs.append(torch.arange(9.0).reshape(3, 3) - place)
        else:
            b.numbers.append(node)
            inputs.append(place)
    fill(b, draw(st.integers(0, 12)))
    b.graph.output(b.argument(3))
    return module_of(b), inputs, b.boxed


def _fresh(gm: fx.GraphModule) -> fx.GraphModule:
    # In-place ops may have changed parameters: every run starts from the same.
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            module.weight.fill_(2.0)
            module.shift.fill_(0.5)
            module.deep.weight.copy_(torch.eye(3))
    return gm


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(graphs())
def test_any_graph_agrees_with_the_interpreter(drawn: Any) -> None:
    gm, inputs, boxed = drawn
    check(gm, *inputs, boxed=boxed, before=lambda: _fresh(gm))
