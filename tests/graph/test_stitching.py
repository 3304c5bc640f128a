"""What is changed in a stitching graph so that pieces get what they were compiled for; the numbers stay."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from stitchcache import split_graph
from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.stitching import bind_placeholders, dense_order, lower_sizes, pin_strides

aten = torch.ops.aten


def split_of(forward, args, cut, **options):
    class Model(nn.Module):
        pass

    Model.forward = forward
    gm = torch.export.export(Model().eval(), args, strict=False, **options).graph_module
    split, items = split_graph(gm, [cut])
    return gm, split, [item.submod_name for item in items if not item.is_splitting_graph]


def run(gm, *args):
    return torch.fx.Interpreter(gm).run(*args)


def placeholders(split, name):
    return [n for n in split.get_submodule(name).graph.nodes if n.op == "placeholder"]


def sizes_taken(split, names):
    """Placeholders of pieces that are no tensors."""
    return [
        node.name
        for name in names
        for node in placeholders(split, name)
        if isinstance(node.meta["val"], symbols.SYMBOLIC)
    ]


ROWS = Dim("rows", min=2, max=50)


def test_a_size_is_read_from_a_tensor_that_has_it():
    def forward(self, x):
        y = torch.softmax(x, -1)
        return y.sin() * x.shape[0]

    gm, split, pieces = split_of(forward, (torch.randn(3, 4),), "aten::softmax", dynamic_shapes=[{0: ROWS}])
    assert sizes_taken(split, pieces), "the test needs a piece that takes a size"
    assert lower_sizes(split, pieces) == set()
    assert sizes_taken(split, pieces) == []
    reads = [n for n in split.get_submodule(pieces[-1]).graph.nodes if n.target is aten.sym_size.int]
    assert len(reads) == 1
    assert len(placeholders(split, pieces[-1])) == 1, "the tensor that it has anyway is enough"
    for rows in (2, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(run(split, x), run(gm, x), rtol=0, atol=0)


def test_a_piece_without_such_a_tensor_gets_one_that_has_the_size():
    def forward(self, x, n):
        y = torch.softmax(x, -1)
        return y.sin() + n * 2

    gm, split, pieces = split_of(
        forward, (torch.randn(3, 4), 5), "aten::softmax", dynamic_shapes=[None, Dim.DYNAMIC]
    )
    assert lower_sizes(split, pieces) == set()
    assert sizes_taken(split, pieces) == []
    made = [n for n in split.graph.nodes if n.target is aten.empty.memory_format]
    assert len(made) == 1
    assert made[0].meta["val"].shape[1] == 0, "the carrier holds no memory"
    for n in (0, 41):
        x = torch.randn(3, 4)
        torch.testing.assert_close(run(split, x, n), run(gm, x, n), rtol=0, atol=0)


def test_a_number_below_zero_leaves_the_piece_as_it_is():
    def forward(self, x, n):
        y = torch.softmax(x, -1)
        return y.sin() + n

    _, split, pieces = split_of(
        forward, (torch.randn(3, 4), -9), "aten::softmax", dynamic_shapes=[None, Dim.DYNAMIC]
    )
    taken = sizes_taken(split, pieces)
    assert taken, "the test needs a piece that takes a number"
    assert lower_sizes(split, pieces) == {pieces[-1]}, "no shape can carry it"
    assert sizes_taken(split, pieces) == taken


@pytest.mark.parametrize(
    ("shape", "stride", "order"),
    [
        ((2, 3), (3, 1), [0, 1]),
        ((2, 3), (1, 2), [1, 0]),
        ((2, 3, 4), (12, 1, 3), [0, 2, 1]),
        ((1, 3), (99, 1), [0, 1]),
        ((2, 1, 3), (3, 5, 1), [0, 1, 2]),
        ((), (), []),
        ((2, 3), (4, 1), None),
        ((2, 3), (0, 1), None),
        ((2, 3), (1, 1), None),
    ],
)
def test_the_order_in_which_a_tensor_is_dense(shape, stride, order):
    tensor = torch.empty(100).as_strided(shape, stride)
    assert dense_order(tensor) == order
    if order:
        assert tensor.permute(order).is_contiguous()


def foreign(permute):
    """x, through a splitting op whose fake promises the order of ``permute``, into a piece."""

    def forward(self, x):
        return torch.softmax(x, -1).permute(*permute) + 1

    gm, split, pieces = split_of(forward, (torch.randn(2, 3, 4),), "aten::softmax")
    return gm, split, pieces


def test_what_a_splitting_op_returns_is_pinned_to_the_promised_strides():
    gm, split, pieces = foreign((0, 1, 2))
    crossing = next(
        node
        for node in split.graph.nodes
        if node.op == "call_function" and any(user.target in pieces for user in node.users)
    )
    crossing.meta["val"] = crossing.meta["val"].permute(0, 2, 1).contiguous().permute(0, 2, 1)
    pin_strides(split, pieces)
    taken = next(node for node in split.graph.nodes if node.target == pieces[-1]).args[0]
    assert taken is not crossing
    assert taken.meta["val"].stride() == (12, 1, 3)

    class Strides(torch.fx.Interpreter):
        def call_module(self, target, args, kwargs):
            if target == pieces[-1]:
                assert args[0].stride() == (12, 1, 3)
            return super().call_module(target, args, kwargs)

    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(Strides(split).run(x), run(gm, x), rtol=0, atol=0)


def test_what_is_checked_or_compiled_by_us_is_not_pinned():
    _, split, pieces = foreign((0, 1, 2))
    every = [node.target for node in split.graph.nodes if node.op == "call_module"]
    before = str(split.graph)
    pin_strides(split, every)
    assert str(split.graph) == before, "all are our pieces: their strides were compared before they were kept"
    pin_strides(split, pieces, passive=[name for name in every if name not in pieces])
    assert str(split.graph) == before


def test_a_result_with_gaps_cannot_be_promised():
    _, split, pieces = foreign((0, 1, 2))
    crossing = next(
        node
        for node in split.graph.nodes
        if node.op == "call_function" and any(user.target in pieces for user in node.users)
    )
    with crossing.meta["val"].fake_mode:
        crossing.meta["val"] = torch.empty(2, 3, 8)[..., ::2]
    with pytest.raises(SplitError, match=f"{crossing.name} reaches a piece with strides"):
        pin_strides(split, pieces)


def added(gm_placeholders=("w", "x", "y")):
    graph = torch.fx.Graph()
    w, x, y = (graph.placeholder(name) for name in gm_placeholders)
    graph.output((graph.call_function(torch.add, (x, w)),))
    assert not y.users
    return torch.fx.GraphModule(nn.Module(), graph)


def test_bound_tensors_become_attributes_by_reference():
    gm, weight = added(), nn.Parameter(torch.ones(3))
    assert bind_placeholders(gm, {"w": ("layer.weight", weight)}) == {"bound.layer.weight": "layer.weight"}
    assert gm.get_parameter("bound.layer.weight") is weight
    assert [node.op for node in gm.graph.nodes][:2] == ["placeholder", "placeholder"]
    x = torch.randn(3)
    assert torch.equal(gm(x, x)[0], x + 1)
    with torch.no_grad():
        weight.fill_(5)
    assert torch.equal(gm(x, x)[0], x + 5), "an update in place is seen"


def test_a_bound_tensor_that_is_not_used_leaves_nothing_behind():
    gm = added()
    assert bind_placeholders(gm, {"y": ("unused", torch.ones(1))}) == {}
    assert [node.name for node in gm.graph.nodes if node.op == "placeholder"] == ["w", "x"]
    assert not list(gm.named_buffers())


def test_placeholders_of_constants_go_and_nothing_may_use_them():
    gm = added()
    assert bind_placeholders(gm, {}, ["y"]) == {}
    assert [node.name for node in gm.graph.nodes if node.op == "placeholder"] == ["w", "x"]
    with pytest.raises(SplitError, match="computes with x"):
        bind_placeholders(gm, {}, ["x"])
