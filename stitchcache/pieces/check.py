"""Compare a freshly compiled piece with eager execution, on real inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stitchcache.errors import PieceMismatchError
from stitchcache.graph import effects, symbols
from stitchcache.pieces.base import BoxedPiece
from stitchcache.torchside.ops import OpOverload
from stitchcache.torchside.tensors import negated, storage_id

# Largest difference, relative to the largest magnitude in the tensor.
_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 5e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
    torch.complex64: 5e-4,
    torch.complex128: 1e-8,
}


def compare_with_eager(
    piece: torch.fx.GraphModule,
    compiled: BoxedPiece,
    inputs: Sequence[torch.Tensor],
    *,
    name: str,
    backend: str,
) -> float:
    """Run a piece both ways and compare results and side effects.

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
    with torch.no_grad():
        eager_inputs = copy(inputs)
        expected = piece(*eager_inputs)
        compiled_inputs = copy(inputs)
        actual = compiled(list(compiled_inputs))
    if len(actual) != len(expected):
        raise _mismatch(name, backend, f"{len(actual)} results instead of {len(expected)}")
    opaque = undefined_outputs(piece)
    worst = 0.0
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        what, strides = f"result {index}", promised[index] if backend != "eager" else None
        worst = max(worst, _compare(want, got, what, name, backend, strides, values=index not in opaque))
    for index, (want, got) in enumerate(zip(eager_inputs, compiled_inputs, strict=True)):
        what = f"input {index} after the call"
        worst = max(worst, _compare(want, got, what, name, backend, None, values=True))
    return worst


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
    """Positions of results whose values are not defined: fresh memory, random numbers."""
    undefined: set[torch.fx.Node] = set()
    for node in piece.graph.nodes:
        if node.op == "output":
            results = node.args[0]
            return {i for i, result in enumerate(results) if result in undefined}
        if _is_fresh(node) or effects.is_random(node) or _reads(node, undefined):
            undefined.add(node)
            undefined.update(effects.written(node))
    return set()


def _is_fresh(node: torch.fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and str(node.target).split(".")[1].startswith(
        ("empty", "new_empty")
    )


def _reads(node: torch.fx.Node, undefined: set[torch.fx.Node]) -> bool:
    return any(source in undefined for source in node.all_input_nodes)


def _compare(
    want: Any,
    got: Any,
    what: str,
    name: str,
    backend: str,
    strides: tuple[int, ...] | None,
    *,
    values: bool,
) -> float:
    """Compare one tensor; ``strides`` are those promised, or ``None`` for eager's own."""
    if not isinstance(want, torch.Tensor):
        if want != got:
            raise _mismatch(name, backend, f"{what} is {got!r} instead of {want!r}")
        return 0.0
    facts = [
        ("dtype", want.dtype, got.dtype),
        ("shape", want.shape, got.shape),
        ("device", want.device, got.device),
    ]
    if want.numel() > 1 and want.shape == got.shape:
        facts.append(("strides", _strides(want, strides), _strides(got)))
    for fact, wanted, found in facts:
        if wanted != found:
            raise _mismatch(name, backend, f"{what} has {fact} {found} instead of {wanted}")
    if not values or want.numel() == 0:
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        if not torch.equal(want, got):
            raise _mismatch(name, backend, f"{what} (integers) differs")
        return 0.0
    return _compare_floats(want, got, what, name, backend)


def _compare_floats(want: torch.Tensor, got: torch.Tensor, what: str, name: str, backend: str) -> float:
    precise = torch.complex128 if want.is_complex() else torch.float64
    a, b = want.to(precise), got.to(precise)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), a - b).abs()
    finite = torch.where(a.isfinite(), a, torch.zeros_like(a)).abs()
    worst = float(difference.max())
    tolerance = _TOLERANCE.get(want.dtype, 6e-2) * max(1.0, float(finite.max()))
    if not worst <= tolerance:
        raise _mismatch(
            name, backend, f"{what} differs by {worst:.3g}, tolerance {tolerance:.3g}", worst, tolerance
        )
    return worst


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
