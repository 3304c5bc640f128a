"""A fresh piece is compared with eager, on real inputs or made-up ones: values, strides, random numbers."""

from __future__ import annotations

import models  # noqa: F401 - registers an op
import pytest
import torch
from torch import nn

import stitchcache
from stitchcache import errors
from stitchcache.capture import capture
from stitchcache.pieces import Piece
from stitchcache.pieces.check import compare_on_stand_ins, compare_with_eager, stand_in
from stitchcache.torchside import has_fakes, without_data


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def piece_of(gm, backend="aoti"):
    return Piece(name="submod_0", key="k", gm=gm, backend=backend)


def exported(function, *args):
    return torch.export.export(Of(function), args, strict=False).graph_module


class Pooled(nn.Module):
    """Fake tensors promise other strides for a pooled transposed tensor than eager gives."""

    def forward(self, x):
        pooled = nn.functional.max_pool1d(x.transpose(1, 2), 3, 2, 1)
        return pooled, torch.ops.stitchtest.scale(pooled, 2.0).relu() + pooled


@pytest.mark.compile
def test_strides_that_eager_and_fakes_disagree_about_are_compiled_all_the_same(compiled_root):
    model = Pooled().eval()
    compiled = stitchcache.compile(model, (torch.randn(2, 6, 8),), cache=stitchcache.Cache(compiled_root))
    x = torch.randn(2, 6, 8)
    for got, want in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(got, want)
    assert {piece.backend for piece in compiled.artifact.pieces} == {"aoti"}


def pooled():
    return capture(Pooled().eval(), (torch.randn(2, 6, 8),), {}).gm


def promised(value):
    return torch.empty_strided(value.shape, (24, 1, 8)).copy_(value)


def test_a_compiled_piece_is_held_to_the_strides_that_fakes_promise():
    gm, x = pooled(), torch.randn(2, 6, 8)

    def keeps(inputs):
        return [promised(value) for value in gm(*inputs)]

    compare_with_eager(piece_of(gm), keeps, [x])
    with pytest.raises(errors.PieceMismatchError, match="strides"):
        compare_with_eager(piece_of(gm), lambda inputs: gm(*inputs), [x])


def test_an_eager_piece_is_held_to_the_strides_of_eager():
    gm, x = pooled(), torch.randn(2, 6, 8)
    compare_with_eager(piece_of(gm, "eager"), lambda inputs: gm(*inputs), [x])


def test_values_that_are_wrong_are_told_with_the_difference():
    gm = exported(lambda x: (x + 1,), torch.ones(3))
    with pytest.raises(errors.PieceMismatchError, match="result 0 differs by 2") as caught:
        compare_with_eager(piece_of(gm), lambda inputs: [inputs[0] + 3], [torch.ones(3)])
    assert caught.value.difference == 2.0
    assert 0 < caught.value.tolerance < 0.01
    assert (caught.value.piece, caught.value.backend) == ("submod_0", "aoti")


def test_values_of_fresh_memory_are_not_compared():
    gm = exported(lambda x: (torch.empty_like(x), x * 2), torch.ones(3))
    x = torch.ones(3)
    compare_with_eager(piece_of(gm), lambda inputs: [torch.full((3,), torch.nan), inputs[0] * 2], [x])
    with pytest.raises(errors.PieceMismatchError, match="result 0 has shape"):
        compare_with_eager(piece_of(gm), lambda inputs: [torch.ones(2), inputs[0] * 2], [x])


def test_random_results_are_compared_and_the_generator_is_left_as_it_was():
    x = torch.rand(3, 4)
    gm = exported(lambda x: (torch.rand_like(x) + torch.randn(3, 4), torch.bernoulli(x)), x)
    before = torch.get_rng_state()
    compare_with_eager(piece_of(gm), lambda inputs: gm(*inputs), [x])
    with pytest.raises(errors.PieceMismatchError, match="result 0"):
        compare_with_eager(piece_of(gm), lambda inputs: (torch.rand(1), gm(*inputs))[1], [x])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "like",
    [
        torch.randn(3, 4).t(),
        torch.randn(1, 4).expand(3, 4),
        torch.randn(0, 4),
        torch.tensor(2.0),
        torch.ones(5, dtype=torch.int32),
        torch.ones(2, 3, dtype=torch.bool),
        torch.randn(2, 3, dtype=torch.complex64),
        torch.randn(4, dtype=torch.bfloat16),
    ],
    ids=lambda like: str(like.dtype) + str(tuple(like.shape)),
)
def test_a_stand_in_keeps_metadata_and_its_values_are_the_labels(like):
    made = stand_in(like, "a")
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
    assert torch.equal(made, stand_in(like, "a"))


def test_on_stand_ins_a_right_piece_passes_and_a_wrong_one_does_not():
    gm = exported(lambda x, w: (torch.log(x @ w),), torch.ones(3, 4), torch.ones(4, 4))
    assert compare_on_stand_ins(piece_of(gm), lambda inputs: gm(*inputs)) == ""
    with pytest.raises(errors.PieceMismatchError):
        compare_on_stand_ins(piece_of(gm), lambda inputs: [r * 1.01 for r in gm(*inputs)])


def test_stand_ins_that_eager_refuses_are_not_run_compiled():
    """An index that is out of range would be read out of range by compiled code."""
    gm = exported(lambda x, i: (x[:, i - 7],), torch.ones(3, 4), torch.tensor([8]))

    def compiled(inputs):
        raise AssertionError("was run")

    assert "out of bounds" in compare_on_stand_ins(piece_of(gm), compiled)


def test_fakes_are_told_from_real_tensors():
    with without_data():
        linear = torch.nn.Linear(2, 2)
    assert has_fakes(linear.parameters())
    assert not has_fakes([torch.ones(1), 3, None])
