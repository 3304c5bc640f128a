"""Captures for size ranges: the same model, one dimension narrowed.

Each range is captured by itself, so its pieces are compiled for just those sizes; a range of one size
gets static code. The contract that calls are checked against is that of the whole range; a narrower
capture that relies on more than that is refused, because nobody would check it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import CodeType
from typing import Any

import torch

from stitchcache.capture.contract import more_constraints
from stitchcache.capture.export import Capture, capture, proved
from stitchcache.errors import OptionError
from stitchcache.keys.inputs import dims_of_leaf, split_path
from stitchcache.torchside import tree
from stitchcache.torchside.tensors import has_fakes
from stitchcache.types import Dim, InputSpec, SizeRange


def capture_ranges(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    size_ranges: Sequence[SizeRange],
) -> tuple[Capture, list[tuple[SizeRange | None, Capture]]]:
    """Capture a model once for its contract, and once for each range.

    Args:
        model: In evaluation mode.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        dynamic_shapes: As for ``torch.export.export``.
        size_ranges: Ranges of one named ``torch.export.Dim``; none for a single capture.

    Returns:
        The capture that has the contract, and a capture for each range.

    Raises:
        OptionError: Ranges overlap, or do not fit the dimension they are about.
        CaptureError: The model cannot be captured.
    """
    dynamic_shapes = _torch_dims(dynamic_shapes)
    whole = capture(model, args, kwargs, dynamic_shapes)
    if not size_ranges:
        return whole, [(None, whole)]
    _check_disjoint(size_ranges)
    label = _label(dynamic_shapes, size_ranges)
    places = _places(model, args, kwargs, dynamic_shapes, label)
    whole = replace(whole, input_spec=_labelled(whole.input_spec, places, label))
    variants: list[tuple[SizeRange | None, Capture]] = []
    for size_range in size_ranges:
        narrowed = _resized((args, dict(kwargs)), places, size_range)
        shapes = _narrowed(dynamic_shapes, label, size_range)
        variant = capture(model, *narrowed, dynamic_shapes=shapes)
        _check_contract(whole, variant, size_range, places)
        variants.append((replace(size_range, dim=label), variant))
    return whole, variants


def prove_ranges(
    whole: Capture,
    variants: Sequence[tuple[SizeRange | None, Capture]],
    codes: Iterable[CodeType],
    example: Sequence[Any],
) -> tuple[Capture, list[tuple[SizeRange | None, Capture]]]:
    """Let only sizes through at which every graph was shown right.

    Args:
        whole: The capture that has the contract.
        variants: From :func:`capture_ranges`.
        codes: Code that ran while they were captured.
        example: The example's leaves as they were given.

    Returns:
        The same, with bounds that hold, and with what that code asks of the arguments.

    Raises:
        OptionError: A range begins below what its own graph can be shown right at.
    """
    asked = more_constraints(codes, example)
    contract = replace(whole.input_spec, constraints=(*whole.input_spec.constraints, *asked))
    if len(variants) == 1 and variants[0][1] is whole:
        done = proved(replace(whole, input_spec=contract))
        return done, [(variants[0][0], done)]
    found: list[tuple[SizeRange | None, Capture]] = []
    for size_range, variant in variants:
        done = proved(variant)
        before = {symbol.name: symbol.min for symbol in variant.input_spec.symbols}
        raised = [s for s in done.input_spec.symbols if s.min > before[s.name]]
        if raised and size_range is not None:
            raise _refuse(
                f"what was captured for {size_range} could not be shown right at size "
                f"{before[raised[0].name]}; begin at {raised[0].min}, or give that size a range of its own."
            )
        found.append((size_range, done))
    return replace(whole, input_spec=contract), found


def _torch_dims(shapes: Any) -> Any:
    """``dynamic_shapes`` with torch's own dimensions in place of ours."""
    if isinstance(shapes, Mapping):
        return {key: _torch_dims(part) for key, part in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(_torch_dims(part) for part in shapes)
    return (
        torch.export.Dim(shapes.name, min=shapes.min, max=shapes.max) if isinstance(shapes, Dim) else shapes
    )


def _refuse(message: str) -> OptionError:
    return OptionError(f"size_ranges: {message}", option="size_ranges")


def _check_disjoint(size_ranges: Sequence[SizeRange]) -> None:
    for low, high in pairwise(sorted(size_ranges)):
        if high.min <= low.max:
            raise _refuse(f"{low} and {high} overlap; give every size to one range.")


def _named(shapes: Any) -> dict[str, Any]:
    """All ``Dim`` objects with a name in a ``dynamic_shapes`` structure."""
    if isinstance(shapes, Mapping):
        return {k: v for part in shapes.values() for k, v in _named(part).items()}
    if isinstance(shapes, (list, tuple)):
        return {k: v for part in shapes for k, v in _named(part).items()}
    name = getattr(shapes, "__name__", None)
    return {name: shapes} if isinstance(name, str) and hasattr(shapes, "min") else {}


def _label(dynamic_shapes: Any, size_ranges: Sequence[SizeRange]) -> str:
    """The dimension that all ranges are about."""
    dims = _named(dynamic_shapes)
    wanted = {size_range.dim for size_range in size_ranges}
    label = next(iter(wanted)) if len(wanted) == 1 else None
    if label is None and len(dims) == 1 and wanted == {None}:
        label = next(iter(dims))
    if label is None or label not in dims:
        raise _refuse(
            f"dynamic_shapes names {', '.join(dims) or 'no dimension'}; say which one is meant, the same for "
            "every range: SizeRange(1, 16, dim='name')."
        )
    if hasattr(dims[label], "root"):
        raise _refuse(f"{label!r} is derived from another dimension; give ranges of that one.")
    for size_range in size_ranges:
        if size_range.min < dims[label].min or size_range.max > dims[label].max:
            raise _refuse(f"{size_range} leaves {label!r}'s {dims[label].min}..{dims[label].max}.")
    return label


def _places(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any, label: str
) -> dict[int, tuple[int, ...]]:
    """Leaf index to the dimensions that have the label."""
    paths = tree.leaf_paths(model.forward, args, dict(kwargs))
    heads = list(dict.fromkeys(split_path(path)[0] for path in paths))
    leaves, _ = tree.flatten((args, dict(kwargs)))
    places: dict[int, tuple[int, ...]] = {}
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if isinstance(leaf, torch.Tensor):
            dims = dims_of_leaf(dynamic_shapes, path, heads, leaf.dim())
            found = tuple(dim for dim, text in dims.items() if text.startswith(f"Dim({label!r},"))
            if found:
                places[index] = found
    if not places:
        raise _refuse(f"no argument has the dimension {label!r} in a place that can be told.")
    return places


def _labelled(spec: InputSpec, places: Mapping[int, tuple[int, ...]], label: str) -> InputSpec:
    index, dims = next(iter(places.items()))
    tensor = spec.leaves[index].tensor
    size = tensor.shape[dims[0]] if tensor is not None else None
    if not isinstance(size, str) or not size.isidentifier():
        raise _refuse(f"the capture made {label!r} static; it cannot be cut into ranges.")
    symbols = tuple(replace(s, label=label) if s.name == size else s for s in spec.symbols)
    return replace(spec, symbols=symbols)


def _resized(
    call: tuple[tuple[Any, ...], dict[str, Any]], places: Mapping[int, tuple[int, ...]], size_range: SizeRange
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with a size inside the range, its rows repeated or dropped."""
    leaves, spec = tree.flatten(call)
    for index, dims in places.items():
        for dim in dims:
            size = leaves[index].shape[dim]
            if size not in size_range:
                wanted = min(max(size, size_range.min), size_range.max)
                if has_fakes([leaves[index]]):
                    shape = list(leaves[index].shape)
                    leaves[index] = leaves[index].new_empty([*shape[:dim], wanted, *shape[dim + 1 :]])
                    continue
                rows = torch.arange(wanted, device=leaves[index].device) % max(1, size)
                leaves[index] = leaves[index].index_select(dim, rows)
    args, kwargs = tree.unflatten(leaves, spec)
    return args, kwargs


def _narrowed(shapes: Any, label: str, size_range: SizeRange) -> Any:
    """``dynamic_shapes`` with one dimension's range replaced; static for a single size."""
    if isinstance(shapes, Mapping):
        return {key: _narrowed(part, label, size_range) for key, part in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        return type(shapes)(_narrowed(part, label, size_range) for part in shapes)
    if getattr(shapes, "__name__", None) != label:
        return shapes
    if size_range.min == size_range.max:
        return torch.export.Dim.STATIC
    return torch.export.Dim(label, min=size_range.min, max=size_range.max)


def _check_contract(
    whole: Capture, variant: Capture, size_range: SizeRange, places: Mapping[int, tuple[int, ...]]
) -> None:
    """What a range's capture relies on must be part of the contract that calls are checked against."""
    if variant.output_spec != whole.output_spec or variant.user_inputs != whole.user_inputs:
        raise _refuse(f"the model returns or takes something else for {size_range}; drop that range.")
    for index, (wide, narrow) in enumerate(
        zip(whole.input_spec.leaves, variant.input_spec.leaves, strict=True)
    ):
        if wide.tensor is None or narrow.tensor is None:
            if wide != narrow:
                raise _refuse(f"argument {wide.path} changes its kind for {size_range}; drop that range.")
            continue
        for dim, (a, b) in enumerate(zip(wide.tensor.shape, narrow.tensor.shape, strict=True)):
            fixed = isinstance(b, int) and not isinstance(a, int)
            if fixed and dim not in places.get(index, ()):
                raise _refuse(
                    f"for {size_range} the capture made {wide.path}.shape[{dim}] static; drop that range."
                )
    known = set(whole.input_spec.constraints)
    more = [c for c in _in_names_of(whole.input_spec, variant.input_spec) if c not in known]
    if more:
        raise _refuse(
            f"for {size_range} the capture relies on {'; '.join(more)} besides the whole range's relations; "
            "drop that range, or choose its ends so that the model takes the same path at every size."
        )


def _in_names_of(wide: InputSpec, narrow: InputSpec) -> list[str]:
    """A narrow contract's relations in the wide one's symbols: with a size fixed, the rest move up."""
    names: dict[str, str] = {}
    for a, b in zip(wide.leaves, narrow.leaves, strict=True):
        if a.tensor is not None and b.tensor is not None:
            names.update((str(y), str(x)) for x, y in zip(a.tensor.shape, b.tensor.shape, strict=True))
    return [re.sub(r"\bs\d+\b", lambda m: names.get(m[0], "?"), c) for c in narrow.constraints]
