"""Made-up inputs: they have the shape of the real ones, and find a wrong piece."""

from __future__ import annotations

import pytest
import torch

from stitchcache import errors
from stitchcache.pieces.check import compare_on_stand_ins, stand_in
from stitchcache.torchside.tensors import has_fakes, without_data


class Of(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def piece_of(function, *args):
    return torch.export.export(Of(function), args, strict=False).graph_module


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
def test_metadata_is_kept_and_values_are_the_labels(like):
    made = stand_in(like, "a")
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
    assert torch.equal(made, stand_in(like, "a"))


def test_a_right_piece_passes_and_a_wrong_one_does_not():
    piece = piece_of(lambda x, w: (torch.log(x @ w),), torch.ones(3, 4), torch.ones(4, 4))
    found = compare_on_stand_ins(piece, lambda inputs: piece(*inputs), name="p", backend="aoti")
    assert found == (0.0, "")
    with pytest.raises(errors.PieceMismatchError):
        compare_on_stand_ins(
            piece, lambda inputs: [r * 1.01 for r in piece(*inputs)], name="p", backend="aoti"
        )


def test_what_eager_refuses_is_not_run_compiled():
    """An index that is out of range would be read out of range by compiled code."""
    piece = piece_of(lambda x, i: (x[:, i - 7],), torch.ones(3, 4), torch.tensor([8]))

    def compiled(inputs):
        raise AssertionError("was run")

    difference, why = compare_on_stand_ins(piece, compiled, name="p", backend="aoti")
    assert difference is None
    assert "out of bounds" in why


def test_fakes_are_told_from_real_tensors():
    with without_data():
        linear = torch.nn.Linear(2, 2)
    assert has_fakes(linear.parameters())
    assert not has_fakes([torch.ones(1), 3, None])
