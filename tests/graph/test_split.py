"""Splitting a graph: what lies where, in which order, and that the whole still computes the same."""

import operator

import pytest
import torch
from torch import nn
from torch.export import Dim

from stitchcache import split_graph
from stitchcache.errors import SplitError, SplittingOpNotFoundError


def captured(forward, *args, **options):
    class Model(nn.Module):
        pass

    Model.forward = forward
    # Above aten's functional subset, so that a write is still an op of the graph.
    return torch.export.export(Model().eval(), args, strict=False, **options).graph_module


def ops_of(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def agrees(gm, split, *args):
    want = torch.fx.Interpreter(gm).run(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
    got = torch.fx.Interpreter(split).run(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def two_softmaxes(self, x):
    y = torch.softmax(x.sin(), -1)
    return torch.softmax(y.cos() + x, -1) * 2


def test_pieces_and_splitting_ops_alternate_in_the_graphs_order():
    gm = captured(two_softmaxes, torch.randn(2, 3))
    split, items = split_graph(gm, ["aten::softmax"])
    assert [item.is_splitting_graph for item in items] == [False, True, False, True, False]
    assert [item.submod_name for item in items] == [f"submod_{i}" for i in range(5)]
    assert [item.graph_id for item in items] == list(range(5))
    assert [op for item in items for op in ops_of(item.graph)] == ops_of(gm)
    assert [n.target for n in split.graph.nodes if n.op == "call_module"] == [i.submod_name for i in items]
    agrees(gm, split, torch.randn(2, 3))


def test_the_given_graph_is_not_changed():
    gm = captured(two_softmaxes, torch.randn(2, 3))
    before = str(gm.graph)
    split_graph(gm, ["aten::softmax"])
    assert str(gm.graph) == before


def test_neighbouring_splitting_ops_share_a_submodule():
    gm = captured(lambda self, x: torch.softmax(torch.relu(x), -1) + 1, torch.randn(2, 3))
    _, items = split_graph(gm, ["aten::relu", "aten::softmax"])
    assert [item.is_splitting_graph for item in items] == [True, False]


def test_every_submodule_returns_a_tuple():
    gm = captured(two_softmaxes, torch.randn(2, 3))
    split, items = split_graph(gm, ["aten::softmax"])
    for item in items:
        output = next(n for n in item.graph.graph.nodes if n.op == "output")
        assert isinstance(output.args[0], tuple)
        call = next(n for n in split.graph.nodes if n.target == item.submod_name)
        assert isinstance(call.meta["val"], tuple)
        assert all(user.target is operator.getitem for user in call.users)


def test_an_item_lies_with_the_result_that_it_is_taken_from():
    def forward(self, x):
        values, indices = torch.sort(x.sin())
        return values.cos(), indices

    gm = captured(forward, torch.randn(2, 5))
    split, items = split_graph(gm, ["aten::sort"])
    inside = next(item for item in items if item.is_splitting_graph)
    assert [op for op in ops_of(inside.graph) if "getitem" in op], "items of a splitting op lie with it"
    for node in split.graph.nodes:
        if node.op == "call_module":
            assert all(isinstance(value, torch.Tensor) for value in node.meta["val"])
    agrees(gm, split, torch.randn(2, 5))


def test_writes_keep_their_order():
    def forward(self, x):
        y = x * 1
        before = y.sum()
        y.add_(1)
        between = torch.softmax(y, -1)
        y.mul_(3)
        return before, between, y

    gm = captured(forward, torch.randn(2, 3))
    split, items = split_graph(gm, ["aten::softmax"])
    assert [op for item in items for op in ops_of(item.graph)] == ops_of(gm)
    agrees(gm, split, torch.randn(2, 3))


def test_sizes_do_not_leave_a_piece():
    def forward(self, x):
        y = torch.cat([x, x])
        return torch.softmax(y, -1).view(y.shape[0], -1) + y.shape[0]

    gm = captured(forward, torch.randn(3, 4), dynamic_shapes=[{0: Dim("n", min=2, max=9)}])
    split, items = split_graph(gm, ["aten::softmax"])
    for item in items:
        output = next(n for n in item.graph.graph.nodes if n.op == "output")
        assert all(isinstance(n.meta["val"], torch.Tensor) for n in output.args[0])
    assert not [n for n in split.graph.nodes if n.op == "call_function" and not n.users], "dead sizes stay"
    for size in (2, 7):
        agrees(gm, split, torch.randn(size, 4))


def test_equal_layers_take_their_inputs_in_the_same_order():
    def forward(self, x):
        for _ in range(3):
            x = torch.softmax(x.sin() + x, -1)
        return x

    _, items = split_graph(captured(forward, torch.randn(2, 3)), ["aten::softmax"])
    layers = [item.graph for item in items if not item.is_splitting_graph]
    shapes = [[n.op for n in layer.graph.nodes] for layer in layers]
    assert shapes[0] == shapes[1] == shapes[2]


def test_parameters_and_buffers_stay_what_they_are():
    root = nn.Module()
    root.inner = nn.Module()
    root.inner.weight = nn.Parameter(torch.ones(3))
    root.inner.register_buffer("scale", torch.full((3,), 2.0))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    scaled = graph.call_function(torch.mul, (x, graph.get_attr("inner.weight")))
    cut = graph.call_function(torch.ops.aten.relu.default, (scaled,))
    graph.output((graph.call_function(torch.add, (cut, graph.get_attr("inner.scale"))),))
    gm = torch.fx.GraphModule(root, graph)
    split, items = split_graph(gm, ["aten::relu"])
    assert dict(items[0].graph.named_parameters())["inner.weight"] is root.inner.weight
    assert dict(items[2].graph.named_buffers())["inner.scale"] is root.inner.scale
    agrees(gm, split, torch.randn(3))


@pytest.mark.parametrize("name", ["aten::softmax", "aten.softmax", "aten::softmax.int", "aten.softmax.int"])
def test_ways_to_name_a_splitting_op(name):
    _, items = split_graph(captured(two_softmaxes, torch.randn(2, 3)), [name])
    assert sum(item.is_splitting_graph for item in items) == 2


def test_an_op_that_is_not_there_is_refused_by_name():
    gm = captured(two_softmaxes, torch.randn(2, 3))
    with pytest.raises(SplittingOpNotFoundError, match="aten::conv2d") as caught:
        split_graph(gm, ["aten::conv2d"])
    assert caught.value.op == "aten::conv2d"
    assert caught.value.present[0] == "aten::softmax.int", "the most frequent op comes first"
    _, items = split_graph(gm, ["aten::conv2d"], missing="ignore")
    assert [item.is_splitting_graph for item in items] == [False]


def test_a_graph_without_an_output_is_refused():
    graph = torch.fx.Graph()
    graph.call_function(torch.relu, (graph.placeholder("x"),))
    gm = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    gm._graph = graph
    with pytest.raises(SplitError, match="no output"):
        split_graph(gm, [])


def test_a_graph_that_computes_nothing():
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))
    split, items = split_graph(torch.fx.GraphModule(nn.Module(), graph), [])
    assert items == []
    agrees(split, split, torch.ones(1))
