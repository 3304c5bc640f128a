"""Strides that eager and torch's fake tensors disagree about: pieces keep to those of the fakes."""

from __future__ import annotations

import models  # noqa: F401 - registers an op
import pytest
import torch
from torch import nn

import stitchcache
from stitchcache import errors
from stitchcache.capture import capture
from stitchcache.pieces.check import compare_with_eager


class Pooled(nn.Module):
    """Fake tensors promise other strides for a pooled transposed tensor than eager gives."""

    def forward(self, x):
        pooled = nn.functional.max_pool1d(x.transpose(1, 2), 3, 2, 1)
        return pooled, torch.ops.stitchtest.scale(pooled, 2.0).relu() + pooled


@pytest.mark.compile
def test_they_are_compiled_all_the_same(compiled_root):
    model = Pooled().eval()
    compiled = stitchcache.compile(model, (torch.randn(2, 6, 8),), cache=stitchcache.Cache(compiled_root))
    x = torch.randn(2, 6, 8)
    for got, want in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(got, want)
    assert {piece.backend for piece in compiled.artifact.pieces} == {"aoti"}


def piece():
    return capture(Pooled().eval(), (torch.randn(2, 6, 8),), {}).gm


def promised(value):
    return torch.empty_strided(value.shape, (24, 1, 8)).copy_(value)


def test_a_compiled_piece_is_held_to_the_promise():
    gm, x = piece(), torch.randn(2, 6, 8)

    def keeps(inputs):
        return [promised(value) for value in gm(*inputs)]

    assert compare_with_eager(gm, keeps, [x], name="submod_0", backend="aoti") == 0
    with pytest.raises(errors.PieceMismatchError, match="strides"):
        compare_with_eager(gm, lambda inputs: gm(*inputs), [x], name="submod_0", backend="aoti")


def test_code_that_is_eager_is_not():
    gm, x = piece(), torch.randn(2, 6, 8)
    assert compare_with_eager(gm, lambda inputs: gm(*inputs), [x], name="submod_0", backend="eager") == 0
