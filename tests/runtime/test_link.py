"""One call over several functions by size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stitchcache.errors import InputMismatchError
from stitchcache.options import SizeRange
from stitchcache.runtime import dispatch_over_ranges


def named(name: str) -> Any:
    return lambda *args: (name, len(args))


def make(*ranges: tuple[int, int], argument: int = 1, dim: int = 0) -> Any:
    functions = [(SizeRange(*each), named(f"{each[0]}-{each[1]}")) for each in ranges]
    return dispatch_over_ranges(functions, argument=argument, dim=dim, name="ids.size(0)")


@pytest.mark.parametrize(
    ("size", "expected"), [(1, "1-1"), (2, "2-8"), (8, "2-8"), (16, "16-32"), (32, "16-32"), (40, "40-40")]
)
def test_each_size_reaches_its_function(size: int, expected: str) -> None:
    run = make((16, 32), (1, 1), (40, 40), (2, 8))
    assert run(None, torch.zeros(size, 3)) == (expected, 2)


@pytest.mark.parametrize("size", [0, 9, 15, 33, 1000])
def test_a_gap_names_the_size_and_the_ranges(size: int) -> None:
    run = make((1, 8), (16, 32))
    with pytest.raises(InputMismatchError, match=r"1\.\.8, 16\.\.32") as caught:
        run(None, torch.zeros(size, 3))
    assert caught.value.argument == "ids.size(0)"
    assert caught.value.actual == str(size)
    assert caught.value.expected == "1..8, 16..32"


def test_the_size_is_looked_at_once_a_call() -> None:
    looks = []

    class Sized:
        def size(self, dim: int) -> int:
            looks.append(dim)
            return 20

    assert make((1, 8), (9, 32), (33, 64), argument=0, dim=1)(Sized()) == ("9-32", 1)
    assert looks == [1]
