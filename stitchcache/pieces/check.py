"""Compare a freshly compiled piece with eager execution: on real inputs, or on made-up ones.

Made-up numbers are the same in every process. Floats have the size that weights and activations have;
integers are 0 or 1, which nearly every table can be indexed with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from stitchcache.compare import allowed, disagreement, measure, unlike
from stitchcache.errors import PieceMismatchError
from stitchcache.graph import effects, symbols
from stitchcache.pieces import FAILURES, BoxedPiece, Piece
from stitchcache.state import clone_all, drawn_back, unwritten
from stitchcache.torchside.ops import OpOverload
from stitchcache.types import span

_SEED = 20


def compare_with_eager(piece: Piece, compiled: BoxedPiece, inputs: Sequence[Any]) -> None:
    """Run a piece both ways and compare results and side effects; a PieceMismatchError says what differs.

    Random numbers are drawn under the same seed both times, and compared like any other. Results must have
    the strides that the capture promised to those who use them. Inputs are left as they were.
    """
    gm = piece.gm
    inputs, promised = _as_promised(gm, inputs)
    if piece.backend == "eager":
        promised = [None] * len(promised)
    placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    written = effects.written_placeholders(gm)
    theirs, ours = list(inputs), list(inputs)
    if written:
        # Weights are most of a model: only what the piece writes is copied.
        keep = unwritten(inputs, (v for name, v in zip(placeholders, inputs, strict=True) if name in written))
        theirs, ours = clone_all(inputs, keep), clone_all(inputs, keep)
    with torch.no_grad(), drawn_back(node.meta.get("val") for node in gm.graph.nodes):
        torch.manual_seed(_SEED)
        expected = gm(*theirs)
        torch.manual_seed(_SEED)
        actual = compiled(list(ours))
    if len(actual) != len(expected):
        raise _mismatch(piece, f"{len(actual)} results instead of {len(expected)}")
    undefined = undefined_outputs(gm)
    results = zip(expected, actual, promised, strict=True)
    pairs = [(f"result {i}", *result, i in undefined) for i, result in enumerate(results)]
    given = enumerate(zip(theirs, ours, strict=True))
    pairs += [(f"input {i} after the call", a, b, None, False) for i, (a, b) in given if a is not b]
    for what, want, got, strides, without_values in pairs:
        fact = unlike(want, got) or _other_strides(want, got, strides)
        if fact:
            raise _mismatch(piece, f"{what} {fact}")
        item = measure(what, want, want if without_values else got)
        wrong = disagreement(item, piece=True)
        if wrong:
            raise _mismatch(piece, f"{what} {wrong}", item.difference, allowed(item, piece=True))


def _mismatch(piece: Piece, what: str, difference: float = 0.0, tolerance: float = 0.0) -> PieceMismatchError:
    return PieceMismatchError(
        f"piece {piece.name}, compiled by {piece.backend}, disagrees with eager execution: {what}. "
        "Nothing was stored. Use backend='eager', or split at the op that differs.",
        backend=piece.backend,
        piece=piece.name,
        difference=difference,
        tolerance=tolerance,
    )


def _as_promised(gm: GraphModule, inputs: Sequence[Any]) -> tuple[list[Any], list[tuple[int, ...] | None]]:
    """Inputs with the strides that the piece is compiled for, and the strides that its results must have.

    torch's fake tensors do not foresee the strides of every op (``max_pool1d`` of a transposed tensor, say).
    Compiled pieces go by the fakes on both sides, so what eager has is no measure there.
    """
    placeholders = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
    values = symbols.solve(zip(placeholders, inputs, strict=False))
    given = []
    for fake, value in zip(placeholders, inputs, strict=True):
        strides = _promise(fake, values)
        if strides is not None and 0 not in strides and _other_strides(value, value, strides):
            made = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
            value = made.copy_(value)
        given.append(value)
    results = next(node.args[0] for node in gm.graph.nodes if node.op == "output")
    fakes = [result.meta.get("val") if isinstance(result, Node) else None for result in results]
    return given, [_promise(fake, values) for fake in fakes]


def _promise(fake: Any, values: Mapping[Any, int]) -> tuple[int, ...] | None:
    if not isinstance(fake, torch.Tensor) or fake.layout != torch.strided:
        return None
    strides = [symbols.evaluate(stride, values) for stride in fake.stride()]
    return None if None in strides else tuple(strides)  # type: ignore[arg-type]


def _other_strides(want: Any, got: Any, strides: tuple[int, ...] | None) -> str:
    """How strides differ from those promised or else from ``want``'s, in dimensions where they are used."""
    if not isinstance(want, torch.Tensor) or want.numel() < 2 or want.layout != torch.strided:
        return ""
    used = [dim for dim, size in enumerate(want.shape) if size > 1]
    wanted, found = (tuple(s[dim] for dim in used) for s in (strides or want.stride(), got.stride()))
    return f"has strides {found} instead of {wanted}" if wanted != found else ""


def undefined_outputs(gm: GraphModule) -> set[int]:
    """Positions of results whose values are not defined: they come from fresh memory."""
    undefined: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "output":
            return {i for i, result in enumerate(node.args[0]) if result in undefined}
        op = str(node.target).split(".")[1] if isinstance(node.target, OpOverload) else ""
        if op.startswith(("empty", "new_empty")) or any(s in undefined for s in node.all_input_nodes):
            undefined.add(node)
            undefined.update(effects.written(node))
    return set()


def stand_in(like: torch.Tensor, label: str, *, positive: bool = False, zero: bool = False) -> torch.Tensor:
    """A tensor with the metadata of another, and with random values that the label decides.

    Symbolic sizes are the example's; a ValueError where data decides one. ``positive`` makes no negative
    floats, ``zero`` no integers but 0.
    """
    shape, stride = ([symbols.example_of(size) for size in sizes] for sizes in (like.shape, like.stride()))
    if None in shape or None in stride:
        raise ValueError(f"{label}: a size that only data decides")
    count = span(shape, stride)
    generator = torch.Generator().manual_seed(int(hashlib.sha256(label.encode()).hexdigest()[:15], 16))
    if not (like.is_floating_point() or like.is_complex()):
        numbers = torch.randint(0, 1 if zero else 2, (count,), generator=generator)
    elif like.dim() < 2:
        # Scales and variances: around 1, so that dividing by one and taking its root makes sense.
        numbers = torch.rand(count, generator=generator) + 0.5
    else:
        numbers = torch.randn(count, generator=generator) / math.sqrt(shape[-1] or 1)
        numbers = numbers.abs() if positive else numbers
    return numbers.to(like.dtype).to(like.device).as_strided(shape, stride)


def compare_on_stand_ins(piece: Piece, compiled: BoxedPiece) -> str:
    """The same without real data. Gives why it was not compared, if eager refuses all that was made up."""
    refused = ""
    values = [symbols.value_of(node) for node in piece.gm.graph.nodes if node.op == "placeholder"]
    for choice in ({}, {"positive": True}, {"positive": True, "zero": True}):
        try:
            inputs = [
                stand_in(value, f"input {index}", **choice)
                if isinstance(value, torch.Tensor)
                else symbols.example_of(value)
                for index, value in enumerate(values)
            ]
            usable = _gives_numbers(piece.gm, inputs)
        except FAILURES as error:
            refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if usable:
            compare_with_eager(piece, compiled, inputs)
            return ""
        refused = "made-up inputs lead to no finite number"
    return refused


def _gives_numbers(gm: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether eager execution takes the inputs, and makes something of them that can be compared."""
    with torch.no_grad():
        results = gm(*clone_all(inputs))
    floats = [r for r in results if isinstance(r, torch.Tensor) and (r.is_floating_point() or r.is_complex())]
    return all(r.numel() == 0 or bool(r.isfinite().any()) for r in floats)
