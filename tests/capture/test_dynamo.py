"""Graphs as Dynamo hands them over become graphs of ops, with tensors that they hold as placeholders."""

import pytest
import torch
from torch import nn

from stitchcache.capture.dynamo import capture_graph, drop_modes, label_of
from stitchcache.errors import CaptureError


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_of(function, *args, use=lambda gm, inputs: (gm, inputs), **options):
    """What is made of each graph while Dynamo calls a backend; the graphs are run as they are."""
    found = []

    def backend(gm, example_inputs):
        found.append(use(gm, list(example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, **options)(*args)
    return found


def captured(function, *args, **options):
    def use(gm, inputs):
        return capture_graph(gm, inputs), gm, inputs

    (found,) = graphs_of(function, *args, use=use, **options)
    return found


def ops(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def test_calls_of_functions_become_ops():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU()).eval()
    got, _, inputs = captured(model, torch.randn(2, 3))
    assert ops(got.gm) == ["aten.linear.default", "aten.gelu.default"]
    assert len(got.user_inputs) == len(inputs) == len(got.input_spec.leaves)
    assert {leaf.kind for leaf in got.input_spec.leaves} == {"tensor"}
    assert got.output_spec.count == 1


def test_the_graph_computes_what_dynamos_does():
    def function(x, y):
        return torch.where(x > 0, x @ y, x - y).softmax(-1), x.sum()

    x, y = torch.randn(3, 3), torch.randn(3, 3)
    got, gm, inputs = captured(function, x, y)
    for want, have in zip(gm(*inputs), got.gm(*inputs), strict=True):
        torch.testing.assert_close(have, want)


def test_an_argument_that_is_written_is_marked():
    def function(total, x):
        total.add_(x)
        return total * 2

    got, _, _ = captured(function, torch.ones(3), torch.ones(3))
    assert sorted(leaf.kind for leaf in got.input_spec.leaves) == ["inout", "tensor"]


def test_a_size_that_varies_is_a_symbol():
    got, _, _ = captured(lambda x: x * x.shape[0], torch.ones(5, 2), dynamic=True)
    kinds = {leaf.kind for leaf in got.input_spec.leaves}
    assert "symbol" in kinds
    assert got.input_spec.symbols


def test_a_mode_that_says_nothing_about_values_is_left_out():
    def function(x):
        with torch.no_grad():
            y = x * 2
        return y + 1

    (gm, _), *_ = graphs_of(function, torch.ones(3, requires_grad=True))
    plain, lowered = drop_modes(gm, autocast=False)
    assert not lowered
    assert not any("grad" in str(node.target) for node in plain.graph.nodes)


def test_casts_of_autocast_are_ops():
    def function(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ y

    got, _, _ = captured(function, torch.ones(3, 3), torch.ones(3, 3))
    assert any("to_copy" in name or ".to." in name for name in ops(got.gm))


def test_a_graph_is_named_after_its_function():
    def named_so(x):
        return x + 1

    ((gm, _),) = graphs_of(named_so, torch.ones(3))
    assert label_of(gm).startswith("named_so at test_dynamo.py:")
    assert label_of(torch.fx.GraphModule(nn.Module(), torch.fx.Graph())) == "torch.compile"


@pytest.mark.parametrize(
    ("given", "words"),
    [(torch.eye(3).to_sparse(), "sparse"), (torch.ones(3, 3, device="meta"), "meta device")],
)
def test_what_compiled_pieces_cannot_take(given, words):
    ((gm, _),) = graphs_of(lambda x: x * 2, torch.ones(3, 3))
    with pytest.raises(CaptureError, match=words):
        capture_graph(gm, [given])
