"""Random data in the place of tensors that have none, so that pieces of a fake model can be checked.

Numbers are the same in every process. Floats have the size that weights and activations have; integers
are 0 or 1, which nearly every table can be indexed with; nothing is made that is not asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from stitchcache.graph.symbols import example_of, value_of
from stitchcache.pieces.base import BoxedPiece
from stitchcache.pieces.check import clone_all, compare_with_eager
from stitchcache.types import span

# What eager execution may raise on numbers that a piece was never meant for.
_REFUSALS = (RuntimeError, ValueError, LookupError, ArithmeticError)


def stand_in(like: torch.Tensor, label: str, *, positive: bool = False, zero: bool = False) -> torch.Tensor:
    """A tensor with the metadata of another and random values.

    Args:
        like: The tensor; its symbolic sizes are taken as in the example.
        label: Decides the values.
        positive: No negative floats.
        zero: All integers are 0.

    Raises:
        ValueError: Its sizes are not known.
    """
    shape, stride = ([example_of(size) for size in sizes] for sizes in (like.shape, like.stride()))
    if None in shape or None in stride:
        raise ValueError(f"{label}: a size that only data decides")
    generator = torch.Generator().manual_seed(int(hashlib.sha256(label.encode()).hexdigest()[:15], 16))
    memory = _numbers(like, span(shape, stride), generator, positive=positive, zero=zero)
    return memory.to(like.device).as_strided(shape, stride)


def _numbers(
    like: torch.Tensor, count: int, generator: torch.Generator, *, positive: bool, zero: bool
) -> torch.Tensor:
    if not (like.is_floating_point() or like.is_complex()):
        return torch.randint(0, 1 if zero else 2, (count,), generator=generator).to(like.dtype)
    if like.dim() < 2:
        # Scales and variances: around 1, so that dividing by one and taking its root makes sense.
        return (torch.rand(count, generator=generator) + 0.5).to(like.dtype)
    numbers = torch.randn(count, generator=generator)
    columns = example_of(like.shape[-1]) or 1
    return ((numbers.abs() if positive else numbers) / math.sqrt(columns)).to(like.dtype)


def compare_on_stand_ins(
    piece: torch.fx.GraphModule, compiled: BoxedPiece, *, name: str, backend: str
) -> tuple[float | None, str]:
    """Compare a compiled piece with eager execution where there is no real data to feed it.

    Args:
        piece: The graph.
        compiled: The same, compiled.
        name: The piece's name, for errors.
        backend: The backend's name, for errors.

    Returns:
        Largest absolute difference; ``None`` with the reason if eager execution refuses all that was tried.

    Raises:
        PieceMismatchError: They differ.
    """
    refused = ""
    for choice in ({}, {"positive": True}, {"positive": True, "zero": True}):
        try:
            inputs = _inputs(piece, choice)
            usable = _gives_numbers(piece, inputs)
        except _REFUSALS as error:
            refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if usable:
            return compare_with_eager(piece, compiled, inputs, name=name, backend=backend), ""
        refused = "made-up inputs lead to no finite number"
    return None, refused


def _inputs(piece: torch.fx.GraphModule, choice: dict[str, bool]) -> list[Any]:
    """Inputs for a piece, and only for it."""
    made: list[Any] = []
    for index, node in enumerate(n for n in piece.graph.nodes if n.op == "placeholder"):
        value = value_of(node)
        made.append(
            stand_in(value, f"input {index}", **choice)
            if isinstance(value, torch.Tensor)
            else example_of(value)
        )
    return made


def _gives_numbers(piece: torch.fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether eager execution takes the inputs, and makes something of them that can be compared."""
    with torch.no_grad():
        results = piece(*clone_all(inputs))
    floats = [r for r in results if isinstance(r, torch.Tensor) and (r.is_floating_point() or r.is_complex())]
    return all(r.numel() == 0 or bool(r.isfinite().any()) for r in floats)
