"""Random ops give eager's numbers under eager's seed, compiled or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stitchcache
from stitchcache.errors import PieceMismatchError
from stitchcache.pieces import COMPILER_OPTIONS
from stitchcache.pieces.check import compare_with_eager
from stitchcache.pipeline.find import Request


class Noisy(nn.Module):
    """One of each that a compiled piece may hold, in an order that decides the numbers."""

    def forward(self, x):
        noise = torch.rand_like(x) + torch.randn(3, 4) * torch.randint(0, 9, (3, 4))
        return F.dropout(x + noise, 0.5, True), torch.bernoulli(x), torch.rand(2)


class Rare(nn.Module):
    """Random ops that AOTInductor has no entry for, or draws otherwise."""

    def forward(self, x):
        return torch.normal(x, 1.0) * 2, torch.empty_like(x).exponential_() + 1, torch.multinomial(x, 2)


def agree(model, compiled, x):
    for seed in (0, 7):
        torch.manual_seed(seed)
        want = [*model(x), torch.rand(1)]
        torch.manual_seed(seed)
        got = [*compiled(x), torch.rand(1)]
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("model", [Noisy().eval(), Rare().eval()], ids=["noisy", "rare"])
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aoti", marks=pytest.mark.compile),
        pytest.param("inductor", marks=pytest.mark.compile),
        "eager",
    ],
)
def test_numbers_are_eagers_under_the_same_seed(compiled_root, backend, model):
    x = torch.rand(3, 4)
    compiled = stitchcache.compile(model, (x,), backend=backend, cache=stitchcache.Cache(compiled_root))
    agree(model, compiled, x)


def test_random_results_are_compared_and_the_generator_is_left_as_it_was():
    x = torch.rand(3, 4)
    piece = torch.export.export(Noisy(), (x,)).module()
    before = torch.get_rng_state()
    assert compare_with_eager(piece, lambda inputs: piece(*inputs), [x], name="p", backend="eager") == 0
    with pytest.raises(PieceMismatchError, match="result 0"):
        compare_with_eager(
            piece, lambda inputs: (torch.rand(1), piece(*inputs))[1], [x], name="p", backend="eager"
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_the_option_is_in_keys_and_the_user_may_say_otherwise():
    assert Request(backend="aoti").backend_options == COMPILER_OPTIONS
    assert Request(backend="eager").backend_options == {}
    chosen = Request(backend="inductor", options={"fallback_random": False, "stitchcache.jobs": 1})
    assert chosen.backend_options == {"fallback_random": False}
