"""Ops: their names, what they write, which are random, and which pieces see shared memory written."""

import operator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stitchcache import split_graph
from stitchcache.graph.effects import (
    alias_hazards,
    is_random,
    matches,
    mutates,
    target_name,
    written,
    written_placeholders,
)

aten = torch.ops.aten


def graph_of(build, *shapes):
    """A graph written by hand, with the values that a trace would have noted."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    result = build(graph, *inputs)
    graph.output(result if isinstance(result, tuple) else (result,))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    with FakeTensorMode() as mode:
        noted = {}
        for node, shape in zip(inputs, shapes, strict=True):
            noted[node] = node.meta["val"] = torch.empty(shape)
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), noted.__getitem__)
                noted[node] = node.meta["val"] = node.target(*args, **kwargs)
    assert mode is not None
    return gm


def node_of(target, *args, **kwargs):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, (x, *args), kwargs)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.add.Tensor, "aten::add.Tensor"),
        (aten.relu.default, "aten::relu.default"),
        (aten.add, "aten::add"),
        (torch.ops.higher_order.cond, "higher_order::cond"),
        (operator.add, "_operator.add"),
    ],
)
def test_names_of_targets(target, name):
    assert target_name(target) == name


def test_an_op_is_meant_by_its_name_with_or_without_overload():
    for wanted in ("aten::add.Tensor", "aten::add", "aten.add", "aten.add.Tensor"):
        assert matches(aten.add.Tensor, wanted)
    for other in ("aten::add.Scalar", "add", "aten::add_", "aten", "mylib::add", ""):
        assert not matches(aten.add.Tensor, other)


def test_what_a_node_writes_into():
    node = node_of(aten.add_.Tensor, 1)
    assert list(written(node)) == [node.args[0]]
    assert list(written(node_of(aten.add.Tensor, 1))) == []
    graph = torch.fx.Graph()
    x, out = graph.placeholder("x"), graph.placeholder("out")
    assert list(written(graph.call_function(aten.sin.out, (x,), {"out": out}))) == [out]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_writes_statistics_although_its_schema_denies_it(training):
    graph = torch.fx.Graph()
    x, mean, var = (graph.placeholder(name) for name in ("x", "mean", "var"))
    node = graph.call_function(
        aten.batch_norm.default, (x, None, None, mean, var, training, 0.1, 1e-5, False)
    )
    assert list(written(node)) == ([mean, var] if training else [])


def test_writes_in_graphs_that_are_called_count():
    inner = graph_of(lambda g, x: g.call_function(aten.add_.Tensor, (x, 1)), 2)
    graph = torch.fx.Graph()
    graph.output((graph.call_module("inner", (graph.placeholder("x"),)),))
    root = nn.Module()
    root.inner = inner
    assert mutates(torch.fx.GraphModule(root, graph).graph)
    assert not mutates(graph_of(lambda g, x: g.call_function(aten.sin.default, (x,)), 2).graph)


@pytest.mark.parametrize(
    ("target", "args", "random"),
    [
        (aten.rand_like.default, (), True),
        (aten.dropout.default, (0.5, True), True),
        (aten.dropout.default, (0.5, False), False),
        (aten.dropout.default, (0.0, True), False),
        (aten.sin.default, (), False),
    ],
)
def test_which_ops_draw_random_numbers(target, args, random):
    assert is_random(node_of(target, *args)) is random


def test_placeholders_that_are_written_through_a_view():
    def build(g, x, y):
        view = g.call_function(aten.view.default, (x, [6]))
        g.call_function(aten.add_.Tensor, (view, 1))
        return g.call_function(aten.add.Tensor, (y, 1))

    assert written_placeholders(graph_of(build, (2, 3), (2, 3))) == {"x0"}


def hazards(build, *shapes):
    split, items = split_graph(graph_of(build, *shapes), ["aten::relu"])
    return alias_hazards(split, [item.submod_name for item in items if not item.is_splitting_graph])


def test_a_piece_that_returns_a_view_of_what_is_written_later_is_a_hazard():
    def build(g, x):
        view = g.call_function(aten.view.default, (x, [6]))
        cut = g.call_function(aten.relu.default, (x,))
        g.call_function(aten.add_.Tensor, (x, 1))
        return g.call_function(aten.add.Tensor, (view, 1)), cut

    assert "submod_0" in hazards(build, (2, 3))


def test_a_view_that_nobody_writes_is_none():
    def build(g, x):
        view = g.call_function(aten.view.default, (x, [6]))
        cut = g.call_function(aten.relu.default, (view,))
        return g.call_function(aten.add.Tensor, (view, cut))

    assert hazards(build, (2, 3)) == set()


def test_a_piece_that_is_given_written_memory_twice_is_a_hazard():
    def build(g, x):
        # The splitting op lies between, so that the last piece takes both as inputs.
        view = g.call_function(aten.view.default, (x, [6]))
        cut = g.call_function(aten.relu.default, (x,))
        g.call_function(aten.mul_.Tensor, (x, 2))
        return g.call_function(aten.add.Tensor, (view, g.call_function(aten.sum.default, (x,)))), cut

    assert "submod_2" in hazards(build, (2, 3))
