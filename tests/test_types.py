"""Plain records and arithmetic on shapes."""

import pytest
import torch

from stitchcache.types import row_major, span


@pytest.mark.parametrize(
    ("shape", "stride", "elements"),
    [
        ((), (), 1),
        ((3,), (1,), 3),
        ((2, 3), (3, 1), 6),
        ((2, 3), (10, 1), 13),
        ((2, 3), (0, 2), 5),
        ((0, 3), (3, 1), 0),
        ((3, 0), (1, 1), 0),
        ((1, 1), (7, 9), 1),
    ],
)
def test_the_span_of_a_tensor_is_the_memory_that_its_strides_reach(shape, stride, elements):
    assert span(shape, stride) == elements
    # torch refuses a view that leaves its storage, so a storage of just that size is the proof.
    memory = torch.zeros(elements)
    memory.as_strided(shape, stride)
    if elements:
        with pytest.raises(RuntimeError, match="out of bounds"):
            memory[:-1].clone().as_strided(shape, stride)


def test_a_shape_and_strides_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        span((2, 3), (1,))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((), ()),
        ((2, 3), (3, 1)),
        (("s0", 384), (384, 1)),
        ((4, "s0"), ("s0", 1)),
        (("s0", "s1", 3), ("(3 * s1)", 3, 1)),
        (("s0", "s2", "s1"), ("(s1 * s2)", "s1", 1)),
        (("(s0 + 1)", 2), (2, 1)),
        ((2, "(s0 + 1)"), None),
    ],
)
def test_strides_by_rows_are_written_as_the_capture_writes_them(shape, strides):
    assert row_major(shape) == strides
