"""Threads of a piece's loops: settled when it runs where there can be enough to share, one otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache.capture import capture
from stitchcache.pieces.compiling import ENOUGH, thread_options


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 512)

    def forward(self, x):
        return self.linear(x).relu()


def piece(rows):
    return capture(Wide().eval(), (torch.randn(rows, 512),), {}).gm


@pytest.mark.parametrize(("rows", "shared"), [(2, False), (ENOUGH // 512 - 1, False), (ENOUGH // 512, True)])
def test_enough_work_is_shared(rows, shared):
    found = thread_options(piece(rows), {})
    assert found.get("cpp.dynamic_threads", False) is shared
    assert (found["cpp.threads"] == 1) is not shared


@pytest.mark.parametrize(
    ("most", "shared"), [(ENOUGH // 512 - 1, False), (ENOUGH // 512, True), (None, True)]
)
@pytest.mark.parametrize("example", [4, 16])
def test_a_size_that_varies_counts_as_the_largest_allowed(most, shared, example):
    rows = torch.export.Dim("rows", min=2, max=most)
    gm = capture(Wide().eval(), (torch.randn(example, 512),), {}, ({0: rows},)).gm
    assert thread_options(gm, {}).get("cpp.dynamic_threads", False) is shared


@pytest.mark.parametrize(("elements", "shared"), [(4, False), (ENOUGH, True)])
def test_a_size_that_only_data_decides_counts_as_the_largest_there_can_be(elements, shared):
    class Chosen(nn.Module):
        def forward(self, x):
            return x.nonzero() + 1

    gm = capture(Chosen(), (torch.randn(elements),), {}).gm
    assert thread_options(gm, {}).get("cpp.dynamic_threads", False) is shared


@pytest.mark.parametrize("option", [{"cpp.threads": 4}, {"cpp.dynamic_threads": False}])
def test_what_the_user_says_is_left_alone(option):
    assert thread_options(piece(256), option) == {}


class Reducing(nn.Module):
    """Loops over rows, over elements, and sums over everything: each kind is shared in its own way."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(48)

    def forward(self, x):
        y = nn.functional.gelu(self.norm(x))
        return y, y.sum(0), (y * y).sum(), y.transpose(0, 1).contiguous().amax(1)


@pytest.fixture(scope="session")
def shared_piece(compiled_root):
    """Compiled with a small example in a child that has one thread."""
    torch.manual_seed(0)
    model = Reducing().eval()
    compiled = stitchcache.compile(
        model,
        (torch.randn(3, 48),),
        dynamic_shapes=({0: stitchcache.Dim("rows", min=2, max=8192)},),
        cache=stitchcache.Cache(compiled_root),
    )
    assert len(compiled.artifact.pieces) == 1
    return model, compiled


@pytest.fixture
def any_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# 12 is more than the number that Inductor is told.
@pytest.mark.parametrize("threads", [1, 2, 4, 12])
@pytest.mark.parametrize("rows", [2, 4099])
@pytest.mark.usefixtures("any_threads")
def test_numbers_are_eagers_on_any_number_of_threads(shared_piece, threads, rows):
    model, compiled = shared_piece
    x = torch.randn(rows, 48)
    with torch.no_grad():
        expected = model(x)
    torch.set_num_threads(threads)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
