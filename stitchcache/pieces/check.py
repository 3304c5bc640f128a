"""Compare a freshly compiled piece with eager execution: on real inputs, or on made-up ones.

Made-up numbers are the same in every process. Floats have the size that weights and activations have;
integers are 0 or 1, which nearly every table can be indexed with; nothing is made that is not asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stitchcache.errors import PieceMismatchError
from stitchcache.graph import effects, symbols
from stitchcache.pieces.backends import BoxedPiece
from stitchcache.torchside.ops import OpOverload
from stitchcache.torchside.tensors import negated, storage_id
from stitchcache.types import span

# Largest difference, relative to the largest magnitude in the tensor.
_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 5e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
    torch.complex64: 5e-4,
    torch.complex128: 1e-8,
}
_SEED = 20
# What eager execution may raise on numbers that a piece was never meant for.
_REFUSALS = (RuntimeError, ValueError, LookupError, ArithmeticError)


def compare_with_eager(
    piece: torch.fx.GraphModule,
    compiled: BoxedPiece,
    inputs: Sequence[torch.Tensor],
    *,
    name: str,
    backend: str,
) -> float:
    """Run a piece both ways and compare results and side effects.

    Random numbers are drawn under the same seed both times, and compared like any other.

    Args:
        piece: The graph.
        compiled: The same, compiled.
        inputs: Tensors that a real run fed to the piece; not changed.
        name: The piece's name, for errors.
        backend: The backend's name, for errors.

    Returns:
        Largest absolute difference seen.

    Raises:
        PieceMismatchError: They differ in number, dtype, shape, device or value, or a result does not have
            the strides that the capture promised to those who use it.
    """
    copy = clone_all if effects.mutates(piece.graph) else list
    inputs, promised = _as_promised(piece, inputs)
    random = any(effects.is_random(node) for node in piece.graph.nodes)
    with torch.no_grad():
        eager_inputs = copy(inputs)
        with _seeded(random):
            expected = piece(*eager_inputs)
        compiled_inputs = copy(inputs)
        with _seeded(random):
            actual = compiled(list(compiled_inputs))
    if len(actual) != len(expected):
        raise _mismatch(name, backend, f"{len(actual)} results instead of {len(expected)}")
    opaque = undefined_outputs(piece)
    pairs = [
        (f"result {i}", want, got, promised[i] if backend != "eager" else None, i not in opaque)
        for i, (want, got) in enumerate(zip(expected, actual, strict=True))
    ] + [
        (f"input {i} after the call", want, got, None, True)
        for i, (want, got) in enumerate(zip(eager_inputs, compiled_inputs, strict=True))
    ]
    worst = 0.0
    for what, want, got, strides, defined in pairs:
        complaint = _unlike(want, got, strides)
        if complaint:
            raise _mismatch(name, backend, f"{what} {complaint}")
        if not defined or not isinstance(want, torch.Tensor) or want.numel() == 0:
            continue
        difference, tolerance = _distance(want, got)
        if not difference <= tolerance:
            said = f"{what} differs by {difference:.3g}, tolerance {tolerance:.3g}"
            raise _mismatch(name, backend, said, difference, tolerance)
        worst = max(worst, difference)
    return worst


@contextmanager
def _seeded(random: bool) -> Iterator[None]:
    """Draw known random numbers, and leave the generators as they were."""
    if not random:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        yield


def _as_promised(
    piece: torch.fx.GraphModule, inputs: Sequence[Any]
) -> tuple[list[Any], list[tuple[int, ...] | None]]:
    """Inputs with the strides that the piece is compiled for, and the strides that its results must have.

    torch's fake tensors do not foresee the strides of every op (``max_pool1d`` of a transposed tensor, say).
    Compiled pieces go by the fakes on both sides, so what eager has is no measure there.
    """
    placeholders = [node.meta.get("val") for node in piece.graph.nodes if node.op == "placeholder"]
    values = symbols.solve(zip(placeholders, inputs, strict=False))
    given = []
    for fake, value in zip(placeholders, inputs, strict=True):
        strides = _promise(fake, values)
        if strides is not None and 0 not in strides and _differ(value, strides):
            value = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(
                value
            )
        given.append(value)
    results = next(node.args[0] for node in piece.graph.nodes if node.op == "output")
    fakes = [result.meta.get("val") if isinstance(result, torch.fx.Node) else None for result in results]
    return given, [_promise(fake, values) for fake in fakes]


def _promise(fake: Any, values: Mapping[Any, int]) -> tuple[int, ...] | None:
    if not isinstance(fake, torch.Tensor) or fake.layout != torch.strided:
        return None
    strides = [symbols.evaluate(stride, values) for stride in fake.stride()]
    return None if None in strides else tuple(strides)  # type: ignore[arg-type]


def _differ(tensor: Any, strides: tuple[int, ...]) -> bool:
    """Whether strides differ where they matter: not in dimensions of one element."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.numel() > 1
        and _strides(tensor) != _strides(tensor, strides)
    )


def clone_all(values: Sequence[Any]) -> list[Any]:
    """Copies of tensors with the same strides; what shares storage shares it in the copies too.

    Anything that is not a tensor is passed through.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: list[Any] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            copies.append(value)
            continue
        key = storage_id(value)
        if key not in storages:
            storages[key] = value.untyped_storage().clone()  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        copy.set_(storages[key], value.storage_offset(), value.size(), value.stride())
        copies.append(_with_bits_of(copy, value))
    return copies


def _with_bits_of(copy: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Views that conjugate or negate lazily do so by a bit of theirs, not in memory."""
    if value.is_conj():
        copy = copy.conj()
    return negated(copy) if value.is_neg() else copy


def undefined_outputs(piece: torch.fx.GraphModule) -> set[int]:
    """Positions of results whose values are not defined: they come from fresh memory."""
    undefined: set[torch.fx.Node] = set()
    for node in piece.graph.nodes:
        if node.op == "output":
            results = node.args[0]
            return {i for i, result in enumerate(results) if result in undefined}
        if _is_fresh(node) or any(source in undefined for source in node.all_input_nodes):
            undefined.add(node)
            undefined.update(effects.written(node))
    return set()


def _is_fresh(node: torch.fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and str(node.target).split(".")[1].startswith(
        ("empty", "new_empty")
    )


def _unlike(want: Any, got: Any, strides: tuple[int, ...] | None) -> str:
    """How two results differ beside values; ``strides`` are those promised, ``None`` for eager's own."""
    if not isinstance(want, torch.Tensor):
        return "" if want == got else f"is {got!r} instead of {want!r}"
    facts = [
        ("dtype", want.dtype, got.dtype),
        ("shape", want.shape, got.shape),
        ("device", want.device, got.device),
    ]
    if want.numel() > 1 and want.shape == got.shape:
        facts.append(("strides", _strides(want, strides), _strides(got)))
    found = ((fact, a, b) for fact, a, b in facts if a != b)
    return next((f"has {fact} {b} instead of {a}" for fact, a, b in found), "")


def _distance(want: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """Largest difference of two tensors' values, and what may be."""
    if not (want.is_floating_point() or want.is_complex()):
        return (0.0 if torch.equal(want, got) else math.inf), 0.0
    precise = torch.complex128 if want.is_complex() else torch.float64
    a, b = want.to(precise), got.to(precise)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), a - b).abs()
    finite = torch.where(a.isfinite(), a, torch.zeros_like(a)).abs()
    return float(difference.max()), _TOLERANCE.get(want.dtype, 6e-2) * max(1.0, float(finite.max()))


def _strides(tensor: torch.Tensor, strides: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Strides of dimensions that have more than one element: the others are never used."""
    own = tensor.stride() if strides is None else strides
    return tuple(s for size, s in zip(tensor.shape, own, strict=True) if size > 1)


def _mismatch(
    name: str, backend: str, what: str, difference: float = 0.0, tolerance: float = 0.0
) -> PieceMismatchError:
    return PieceMismatchError(
        f"piece {name}, compiled by {backend}, disagrees with eager execution: {what}. "
        "Nothing was stored. Use backend='eager', or split at the op that differs.",
        backend=backend,
        piece=name,
        difference=difference,
        tolerance=tolerance,
    )


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
    shape, stride = ([symbols.example_of(size) for size in sizes] for sizes in (like.shape, like.stride()))
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
    columns = symbols.example_of(like.shape[-1]) or 1
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
        value = symbols.value_of(node)
        made.append(
            stand_in(value, f"input {index}", **choice)
            if isinstance(value, torch.Tensor)
            else symbols.example_of(value)
        )
    return made


def _gives_numbers(piece: torch.fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether eager execution takes the inputs, and makes something of them that can be compared."""
    with torch.no_grad():
        results = piece(*clone_all(inputs))
    floats = [r for r in results if isinstance(r, torch.Tensor) and (r.is_floating_point() or r.is_complex())]
    return all(r.numel() == 0 or bool(r.isfinite().any()) for r in floats)
