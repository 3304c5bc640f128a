"""Sizes below torch's own assumption: served only where graph and model agree on them."""

import logging

import pytest
import torch
from torch import nn
from torch.export import Dim

import stitchcache
from stitchcache.capture import capture
from stitchcache.errors import InputMismatchError
from stitchcache.pipeline.look_cold import proved
from stitchcache.report.entry import input_lines


def lowest(model, args, dynamic_shapes, **kwargs):
    # Forwards here take *args: their shapes are nested once more.
    got = proved(model, capture(model.eval(), args, kwargs, [tuple(dynamic_shapes)]), {})
    return [symbol.min for symbol in got.input_spec.symbols]


class Of(nn.Module):
    def __init__(self, function, **buffers):
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args):
        return self.function(self, *args)


ONE, OTHER = Dim("ONE", min=1, max=64), Dim("OTHER", min=1, max=64)
r = torch.randn


def test_pointwise_code_is_right_at_one():
    assert lowest(Of(lambda s, x: x.softmax(-1) * 2), (r(3, 4),), [{0: ONE}]) == [1]


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: x * 2 if x.shape[0] == 1 else x * 3,
        lambda s, x: x.squeeze(0).sum(0),
        lambda s, x: x.squeeze(),
        lambda s, x: x if x.shape[0] > 1 else torch.zeros(1),
        lambda s, x: x.var(0),
        lambda s, x: (x, x.shape[0] > 1),
    ],
    ids=["branch", "squeeze-sum", "squeeze", "other-result", "nan", "comparison"],
)
def test_a_graph_that_is_wrong_at_one_is_not_served_there(function):
    model, x = Of(function), r(3, 4)
    bounds = lowest(model, (x,), [{0: ONE}])
    graph = capture(model.eval(), (x,), {}, [({0: ONE},)])
    with torch.no_grad():
        (got, *_), want = graph.gm(x[:1]), model(x[:1])
    wants = want[0] if isinstance(want, tuple) else want
    agrees = got.shape == wants.shape and torch.allclose(got, wants, equal_nan=True)
    if isinstance(want, tuple):
        agrees = agrees and graph.gm(x[:1])[1] == want[1]
    assert bounds == [1 if agrees else 2]


def test_a_branch_raises_the_bound_and_says_so(caplog):
    model = Of(lambda s, x: x * 2 if x.shape[0] == 1 else x * 3)
    with caplog.at_level(logging.INFO, logger="stitchcache"):
        assert lowest(model, (r(3, 4),), [{0: ONE}]) == [2]
    (record,) = [r for r in caplog.records if "is served from 2" in r.getMessage()]
    assert record.levelno == logging.INFO


class OtherAtOne(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] == 1 else x * 3


def test_a_range_that_is_served_narrower_is_told_at_every_start(tmp_path, caplog):
    model, shapes = OtherAtOne().eval(), ({0: Dim("B", min=1, max=8)},)
    cache, more = stitchcache.Cache(tmp_path), {"backend": "eager", "dynamic_shapes": shapes}
    for hit in (None, "direct"):
        caplog.clear()
        compiled = stitchcache.compile(model, (r(3, 4),), cache=cache, **more)
        assert compiled.cache_hit == hit
        (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "B may be from 1, and is served from 2" in told
    with pytest.raises(InputMismatchError, match=r"size_ranges=\[SizeRange\(1, 1\), SizeRange\(2, 8\)\]"):
        compiled(r(1, 4))
    lines = dict(input_lines(compiled.artifact))
    assert "2..8; B may be from 1, and is served from 2" in lines["s0"]
    # The way out that all of these name.
    ranges = [stitchcache.SizeRange(1, 1), stitchcache.SizeRange(2, 8)]
    caplog.clear()
    both = stitchcache.compile(model, (r(3, 4),), cache=cache, size_ranges=ranges, **more)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    for size in (1, 2, 8):
        x = r(size, 4)
        torch.testing.assert_close(both(x), model(x))


def test_each_size_is_tried_alone():
    def forward(s, x, y):
        return x.sum() + (y * 2 if y.shape[0] == 1 else y * 3)

    assert lowest(Of(forward), (r(3, 4), r(5, 4)), [{0: ONE}, {0: OTHER}]) == [1, 2]


def test_sizes_are_tried_together():
    def forward(s, x, y):
        return x.sum() + y.sum() * (5 if x.shape[0] * y.shape[0] == 1 else 1)

    assert lowest(Of(forward), (r(3, 4), r(5, 4)), [{0: ONE}, {0: OTHER}]) == [2, 2]


def test_torch_bounds_are_left_alone():
    assert lowest(Of(lambda s, x: x * 2), (r(6, 4),), [{0: Dim("B", min=5, max=9)}]) == [5]
    assert lowest(Of(lambda s, x: x * 2), (r(6, 4),), [{0: Dim.DYNAMIC}]) == [2]
    assert lowest(Of(lambda s, x: x * 2), (r(6, 4),), [{0: Dim("B")}]) == [1]


def test_the_model_is_left_as_it_was():
    def forward(s, x):
        s.count.add_(1)
        s.last = s.last + x.sum()
        x.mul_(2)
        return x + s.count

    model, x = Of(forward, count=torch.zeros(1), last=torch.zeros(())), r(3, 4)
    before, state = x.clone(), torch.get_rng_state()
    assert lowest(model, (x,), [{0: ONE}]) == [1]
    assert torch.equal(x, before)
    assert torch.equal(model.count, torch.zeros(1))
    assert torch.equal(model.last, torch.zeros(()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_refuses_the_size_is_not_served_there():
    def forward(s, x):
        if x.shape[0] == 1:
            raise ValueError("batches only")
        return x * 2

    assert lowest(Of(forward), (r(3, 4),), [{0: ONE}]) == [2]


def test_derived_sizes_and_ints():
    def forward(s, x, y):
        return x[: y.shape[0]] + y

    assert lowest(Of(forward), (r(6, 2), r(5, 2)), [{0: ONE + 1}, {0: ONE}]) == [1]
    assert lowest(Of(lambda s, x, n: x * n), (r(3), 5), [None, Dim.DYNAMIC])[0] >= 0
