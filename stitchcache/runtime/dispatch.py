"""One callable over several, chosen by the size of one dimension of one argument."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from stitchcache.errors import InputMismatchError, OptionError
from stitchcache.types import SizeRange


def dispatch_over_ranges(
    functions: Sequence[tuple[SizeRange, Callable[..., Any]]], *, argument: int, dim: int, name: str
) -> Callable[..., Any]:
    """Make one function of several, each of which serves a range of sizes.

    The size is looked at once a call.

    Args:
        functions: Each range with its function. Order does not matter; ranges must not overlap.
        argument: Position of the tensor that has the size.
        dim: The tensor's dimension.
        name: What the user calls that dimension, such as ``ids.size(1)``; for messages.

    Returns:
        A function over the same positional arguments. It raises `InputMismatchError` for a size in
        no range.

    Raises:
        OptionError: There is no range, or two overlap.
    """
    table = sorted(functions, key=lambda entry: (entry[0].min, entry[0].max))
    if not table:
        raise OptionError("size_ranges is empty: at least one range is needed.", option="size_ranges")
    for (lower, _), (upper, _) in pairwise(table):
        if upper.min <= lower.max:
            raise OptionError(
                f"The size ranges {lower} and {upper} overlap: a size must lead to one function.",
                option="size_ranges",
            )
    # The first range that does not end below the size; one past the last, where no size may be.
    ends = [size_range.max for size_range, _ in table]
    starts: list[float] = [*(size_range.min for size_range, _ in table), math.inf]
    targets = [function for _, function in table]
    ranges = ", ".join(str(size_range) for size_range, _ in table)

    def dispatch(*args: Any) -> Any:
        size = args[argument].size(dim)
        place = bisect_left(ends, size)
        if size < starts[place]:
            raise InputMismatchError(
                f"{name} is {size}, and this was compiled for {ranges} only. "
                "Pad the input, or compile with a range that holds this size.",
                argument=name,
                expected=ranges,
                actual=str(size),
            )
        return targets[place](*args)

    return dispatch
