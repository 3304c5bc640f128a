"""Linking: pieces, tensors and stitching code of an artifact, bound together. Does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stitchcache.codegen import CodeObjects, bind_execution_fn
from stitchcache.errors import BindError, EntryFormatError, LinkError
from stitchcache.runtime import dispatch_over_ranges
from stitchcache.state import elements_of, state_of, tensor_at
from stitchcache.types import BOUND, Artifact, BindingSpec, Variant


def link(
    artifact: Artifact,
    pieces: Mapping[str, Any],
    tensors: Mapping[str, Any],
    objects: CodeObjects,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Make an artifact callable over the leaves that its stitching function takes; returns flat results.

    Takes a loaded piece for each piece key, and a tensor for each binding's name. Does no I/O. Each variant's
    function is put through ``around``.

    Raises:
        LinkError: A piece or a tensor is missing; ``missing`` lists the names.
        EntryFormatError: The code is not what stitchcache generates, or the entry has no contract.
    """
    if artifact.input_spec is None or artifact.output_spec is None:
        raise EntryFormatError(
            f"entry {artifact.graph_hash[:12]} was made through the engine API and says nothing about "
            "arguments; load it with stitchcache.load_execution.",
            field="input_spec",
            reason="missing",
        )
    functions = [
        (variant.size_range, _link_variant(variant, pieces, tensors, objects))
        for variant in artifact.variants
    ]
    if around is not None:
        functions = [(size_range, around(function)) for size_range, function in functions]
    if len(functions) == 1 and functions[0][0] is None:
        return functions[0][1]
    argument, dim, name = _dispatch_on(artifact)
    ranged = [(size_range, function) for size_range, function in functions if size_range is not None]
    return dispatch_over_ranges(ranged, argument=argument, dim=dim, name=name)


def _link_variant(
    variant: Variant, pieces: Mapping[str, Any], tensors: Mapping[str, Any], objects: CodeObjects
) -> Callable[..., Any]:
    callables = {piece.name: pieces.get(piece.key) for piece in variant.pieces}
    for name in variant.submod_names:
        if name.startswith(f"{BOUND}."):
            callables[name] = tensors.get(name.removeprefix(f"{BOUND}."))
    missing = [name for name, found in callables.items() if found is None]
    if missing:
        raise LinkError(
            f"the stitching code needs {', '.join(missing)}, which this entry does not have. "
            "Run 'stitchcache verify --repair' and compile again.",
            missing=missing,
        )
    consts: list[Any] = []
    if variant.consts is not None:
        # Most code has none, and what reads them is one of the larger modules.
        from stitchcache.artifact.consts import load_consts

        consts = load_consts(variant.consts)
    return bind_execution_fn(variant.code, callables, variant.submod_names, consts, objects)


def _dispatch_on(artifact: Artifact) -> tuple[int, int, str]:
    """Which argument's size chooses the variant."""
    wanted = next((v.size_range.dim for v in artifact.variants if v.size_range is not None), None)
    spec = artifact.input_spec
    if spec is not None:
        symbols = [symbol.name for symbol in spec.symbols if wanted in (None, symbol.label)]
        taken = [leaf for leaf in spec.leaves if leaf.kind != "constant"]
        for position, leaf in enumerate(taken):
            if leaf.tensor is not None and symbols and symbols[0] in leaf.tensor.shape:
                dim = leaf.tensor.shape.index(symbols[0])
                return position, dim, f"{leaf.path}.shape[{dim}]"
    raise LinkError("the artifact has variants by size, and no argument has that size.", missing=[])


def bind_tensors(
    bindings: tuple[BindingSpec, ...], model: torch.nn.Module, constants: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Look up the tensors that stitching code uses, by reference.

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
            what = f"the model has no {binding.kind} {binding.name!r}, which the artifact uses"
            raise _unfit(what, binding.name, binding.kind, "nothing")
        for alias in binding.aliases:
            other = state.get(alias)
            if other is None:
                other = tensor_at(model, alias)
            # Another object over the same memory is the same to whoever reads or writes it.
            if other is not tensor and (other is None or elements_of(other) != elements_of(tensor)):
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
            what = f"{binding.kind} {binding.name!r} has {fact} {actual}, the artifact needs {wanted}"
            raise _unfit(what, binding.name, f"{fact} {wanted}", str(actual))


def _unfit(what: str, name: str, expected: str, actual: str) -> BindError:
    return BindError(
        f"{what}. Load it with the model that it was compiled from, or compile this one.",
        name=name,
        expected=expected,
        actual=actual,
    )
