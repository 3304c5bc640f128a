"""Bind compiled pieces to stitching code. Cold and warm starts both end here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stitchcache.artifact.record import Artifact, Variant
from stitchcache.codegen.execution import CodeObjects, bind_execution_fn
from stitchcache.errors import LinkError
from stitchcache.types import BOUND


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
    from stitchcache.runtime.dispatch import dispatch_over_ranges

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
