"""Bind a model's tensors and compiled pieces to stitching code. Cold and warm starts both end here."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from stitchcache.codegen.execution import CodeObjects, bind_execution_fn
from stitchcache.errors import BindError, InputMismatchError, LinkError, OptionError
from stitchcache.state import memory_of, state_of, tensor_at
from stitchcache.types import BOUND, Artifact, BindingSpec, SizeRange, Variant


def link(
    artifact: Artifact,
    pieces: Mapping[str, Any],
    tensors: Mapping[str, Any],
    objects: CodeObjects | None = None,
) -> Callable[..., Any]:
    """Make an artifact callable. Does no I/O.

    Args:
        artifact: A decoded entry; not changed.
        pieces: A loaded piece for each piece key.
        tensors: A tensor for each binding's name.
        objects: Code objects that are kept, and are to be kept.

    Returns:
        A callable over the leaves that the stitching function takes, in order; returns flat results.

    Raises:
        LinkError: A piece or a tensor is missing; ``missing`` lists the names.
        EntryFormatError: The code is not of the shape that stitchcache generates.
    """
    known = objects if objects is not None else CodeObjects()
    functions = [
        (variant.size_range, link_variant(variant, pieces, tensors, known)) for variant in artifact.variants
    ]
    if len(functions) == 1 and functions[0][0] is None:
        return functions[0][1]
    from stitchcache.runtime.link import dispatch_over_ranges

    argument, dim, name = _dispatch_on(artifact)
    ranged = [(size_range, function) for size_range, function in functions if size_range is not None]
    return dispatch_over_ranges(ranged, argument=argument, dim=dim, name=name)


def link_variant(
    variant: Variant, pieces: Mapping[str, Any], tensors: Mapping[str, Any], objects: CodeObjects
) -> Callable[..., Any]:
    """Make one variant callable; see :func:`link`."""
    callables: dict[str, Any] = {}
    missing = []
    for piece in variant.pieces:
        if piece.key in pieces:
            callables[piece.name] = pieces[piece.key]
        else:
            missing.append(piece.name)
    for name in variant.submod_names:
        if name.startswith(f"{BOUND}."):
            tensor = tensors.get(name.removeprefix(f"{BOUND}."))
            if tensor is None:
                missing.append(name)
            else:
                callables[name] = tensor
    if missing:
        raise LinkError(
            f"the stitching code needs {', '.join(missing)}, which the artifact does not bring. "
            "Run 'stitchcache verify --repair' and compile again.",
            missing=missing,
        )
    return bind_execution_fn(variant.code, callables, variant.submod_names, _consts(variant), objects)


def _consts(variant: Variant) -> list[Any]:
    if variant.consts is None:
        return []
    # Most code has none, and what reads them is one of the larger modules.
    from stitchcache.artifact.consts import load_consts

    return load_consts(variant.consts)


def _dispatch_on(artifact: Artifact) -> tuple[int, int, str]:
    """Which argument's size chooses the variant."""
    wanted = next((v.size_range.dim for v in artifact.variants if v.size_range is not None), None)
    spec = artifact.input_spec
    if spec is not None:
        symbols = [symbol.name for symbol in spec.symbols if wanted in (None, symbol.label)]
        taken = -1
        for leaf in spec.leaves:
            taken += leaf.kind != "constant"
            if leaf.tensor is not None and symbols and symbols[0] in leaf.tensor.shape:
                dim = leaf.tensor.shape.index(symbols[0])
                return taken, dim, f"{leaf.path}.shape[{dim}]"
    raise LinkError("the artifact has variants by size, and no argument has that size.", missing=[])


def bind_tensors(
    bindings: tuple[BindingSpec, ...], model: torch.nn.Module, constants: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Look up the tensors that stitching code uses.

    Args:
        bindings: What is needed.
        model: Whose parameters and buffers to use; by reference.
        constants: Tensors that the artifact itself carries.

    Returns:
        Binding name to tensor.

    Raises:
        BindError: One is missing, or differs in shape, strides, dtype or device type.
    """
    state = state_of(model)
    dtypes: dict[str, object] = {}
    found: dict[str, torch.Tensor] = {}
    for binding in bindings:
        if binding.kind == "attribute":
            tensor = tensor_at(model, binding.name)
        else:
            tensor = (constants if binding.kind == "constant" else state).get(binding.name)
        if tensor is None:
            raise BindError(
                f"the model has no {binding.kind} {binding.name!r}, which the artifact uses. "
                "Load it with the model that it was compiled from, or compile this one.",
                name=binding.name,
                expected=binding.kind,
                actual="nothing",
            )
        for alias in binding.aliases:
            other = state.get(alias)
            if other is None:
                other = tensor_at(model, alias)
            # Another object over the same memory is the same to whoever reads or writes it.
            if other is not tensor and (other is None or memory_of(other) != memory_of(tensor)):
                raise BindError(
                    f"{alias!r} and {binding.name!r} were one tensor when the artifact was compiled and are "
                    "two now. Tie them again, or compile this model.",
                    name=alias,
                    expected=f"the same tensor as {binding.name}",
                    actual="another tensor",
                )
        spec = binding.tensor
        if spec.dtype not in dtypes:
            dtypes[spec.dtype] = getattr(torch, spec.dtype, None)
        # Nearly always all is as it was; what is not, and whether it matters, is found out apart.
        if (
            tensor.shape != spec.shape
            or tensor.dtype is not dtypes[spec.dtype]
            or tensor.device.type != spec.device
            or tensor.stride() != spec.stride
        ):
            _check(binding, tensor)
        found[binding.name] = tensor
    return found


def _check(binding: BindingSpec, tensor: torch.Tensor) -> None:
    spec = binding.tensor
    strides = [
        (s, w) for size, s, w in zip(tensor.shape, tensor.stride(), spec.stride, strict=False) if size > 1
    ]
    facts = (
        ("shape", spec.shape, tuple(tensor.shape)),
        ("dtype", spec.dtype, str(tensor.dtype).removeprefix("torch.")),
        ("device", spec.device, tensor.device.type),
        ("strides", [w for _, w in strides], [s for s, _ in strides]),
    )
    for fact, wanted, actual in facts:
        if wanted != actual:
            raise BindError(
                f"{binding.kind} {binding.name!r} has {fact} {actual}, the artifact needs {wanted}. "
                "Load it with the model that it was compiled from, or compile this one.",
                name=binding.name,
                expected=f"{fact} {wanted}",
                actual=str(actual),
            )


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
