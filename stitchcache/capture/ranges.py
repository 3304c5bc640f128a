"""Captures for size ranges: the same model, one dimension narrowed.

Each range is captured by itself, so its pieces are compiled for just those sizes. Calls are checked against
the contract of the whole range: a narrower capture that relies on more is refused, as nobody would check it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import sympy
import torch

from stitchcache.capture.export import Capture, capture
from stitchcache.errors import OptionError
from stitchcache.graph import symbols
from stitchcache.keys import dims_of_leaf, split_path
from stitchcache.options import Dim, SizeRange
from stitchcache.torchside import has_fakes, tree
from stitchcache.torchside.ops import guarded_facts
from stitchcache.types import InputSpec

Variants = Sequence[tuple[SizeRange | None, Capture]]
"""A capture for each size range, or one for all sizes."""


def capture_ranges(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    size_ranges: Sequence[SizeRange],
) -> tuple[Capture, Variants]:
    """Capture a model once for its contract, and once for each range of one named dimension.

    An OptionError where ranges overlap, or do not fit the dimension that they are about.
    """
    dynamic_shapes = _with_dims(dynamic_shapes, _torch_dim)
    whole = capture(model, args, kwargs, dynamic_shapes)
    if not size_ranges:
        return whole, [(None, whole)]
    for low, high in pairwise(sorted(size_ranges)):
        if high.min <= low.max:
            raise refuse(f"{low} and {high} overlap; give every size to one range.")
    label = _label(dynamic_shapes, size_ranges)
    size = _size(whole.input_spec, dynamic_shapes, label)
    labelled = tuple(replace(s, label=label) if s.name == size else s for s in whole.input_spec.symbols)
    whole = replace(whole, input_spec=replace(whole.input_spec, symbols=labelled))
    variants: list[tuple[SizeRange | None, Capture]] = []
    symbol = next(symbol for symbol, name in whole.names.items() if name == size)
    now = symbols.solve(_pairs(whole))[symbol]
    for one in size_ranges:
        leaves = resized(whole, {symbol: min(max(now, one.min), one.max)})
        if leaves is None:
            raise refuse(f"the capture of the whole range rules out the sizes {one}; drop that range.")
        given, named = tree.unflatten(leaves, tree.loads(whole.input_spec.tree))
        shapes = _with_dims(dynamic_shapes, lambda dim, one=one: _narrowed(dim, label, one))  # type: ignore[misc]
        variant = capture(model, given, named, shapes)
        _check_contract(whole, variant, one, size)
        variants.append((replace(one, dim=label), variant))
    return whole, variants


def refuse(message: str) -> OptionError:
    """An error about ``size_ranges``."""
    return OptionError(f"size_ranges: {message}", option="size_ranges")


def _with_dims(shapes: Any, change: Callable[[Any], Any]) -> Any:
    """``dynamic_shapes`` with something else in place of each dimension."""
    leaves, spec = tree.flatten(shapes)
    return tree.unflatten([change(leaf) for leaf in leaves], spec)


def _torch_dim(dim: Any) -> Any:
    return torch.export.Dim(dim.name, min=dim.min, max=dim.max) if isinstance(dim, Dim) else dim


def _narrowed(dim: Any, label: str, size_range: SizeRange) -> Any:
    """The dimension of the ranges with one range; static for a single size."""
    if getattr(dim, "__name__", None) != label:
        return dim
    if size_range.min == size_range.max:
        return torch.export.Dim.STATIC
    return torch.export.Dim(label, min=size_range.min, max=size_range.max)


def _label(dynamic_shapes: Any, size_ranges: Sequence[SizeRange]) -> str:
    """The name of the dimension that all ranges are about."""
    dims = {
        dim.__name__: dim
        for dim in tree.flatten(dynamic_shapes)[0]
        if isinstance(getattr(dim, "__name__", None), str) and hasattr(dim, "min")
    }
    wanted = {size_range.dim for size_range in size_ranges}
    if wanted == {None} and len(dims) == 1:
        wanted = set(dims)
    label = wanted.pop() if len(wanted) == 1 else None
    if label is None or label not in dims:
        raise refuse(
            f"dynamic_shapes names {', '.join(dims) or 'no dimension'}; say which one is meant, the same for "
            "every range: SizeRange(1, 16, dim='name')."
        )
    if hasattr(dims[label], "root"):
        raise refuse(f"{label!r} is derived from another dimension; give ranges of that one.")
    for size_range in size_ranges:
        if size_range.min < dims[label].min or size_range.max > dims[label].max:
            raise refuse(f"{size_range} leaves {label!r}'s {dims[label].min}..{dims[label].max}.")
    return label


def _size(spec: InputSpec, dynamic_shapes: Any, label: str) -> str:
    """The symbol that the contract has for the dimension."""
    heads = list(dict.fromkeys(split_path(leaf.path)[0] for leaf in spec.leaves))
    for leaf in spec.leaves:
        shape = leaf.tensor.shape if leaf.tensor is not None else ()
        for dim, text in dims_of_leaf(dynamic_shapes, leaf.path, heads, len(shape)).items():
            if text.startswith(f"Dim({label},"):
                size = shape[dim]
                if isinstance(size, str) and size.isidentifier():
                    return size
                raise refuse(f"the capture made {label!r} static; it cannot be cut into ranges.")
    raise refuse(f"no argument has the dimension {label!r} in a place that can be told.")


def resized(captured: Capture, sizes: Mapping[sympy.Symbol, int]) -> list[Any] | None:
    """The example's leaves at other sizes, rows dropped or repeated; ``None`` if the graph rules them out."""
    pairs, leaves = _pairs(captured), []
    values = {symbol: sympy.Integer(size) for symbol, size in {**symbols.solve(pairs), **sizes}.items()}
    for fake, leaf in pairs:
        if isinstance(fake, torch.SymInt):
            leaf = symbols.evaluate(fake, values)
        elif isinstance(leaf, torch.Tensor) and isinstance(fake, torch.Tensor):
            leaf = _at_sizes(leaf, fake, values)
        if leaf is None and fake is not None:
            return None
        leaves.append(leaf)
    shape_env = symbols.shape_environment(captured.gm.graph)
    facts = guarded_facts(shape_env) if shape_env is not None else ()
    return None if any(fact.xreplace(values) == sympy.false for fact in facts) else leaves


def _pairs(captured: Capture) -> list[tuple[Any, Any]]:
    """What the graph knows of each leaf, and the example's."""
    nodes = captured.gm.graph.nodes
    known = {node.name: node.meta.get("val") for node in nodes if node.op == "placeholder"}
    return list(zip(map(known.get, captured.user_inputs), captured.example, strict=True))


def _at_sizes(leaf: torch.Tensor, fake: torch.Tensor, values: Mapping[Any, Any]) -> torch.Tensor | None:
    """A leaf at other sizes, with the strides of the contract."""
    shape: list[Any] = [symbols.evaluate(size, values) for size in fake.shape]
    stride: list[Any] = [symbols.evaluate(size, values) for size in fake.stride()]
    if None in shape or None in stride:
        return None
    if has_fakes([leaf]):
        return leaf.new_empty_strided(shape, stride)
    rows = leaf
    for dim, size in enumerate(shape):
        have = leaf.shape[dim]
        repeated = torch.arange(size, device=leaf.device) % max(1, have)
        rows = rows.narrow(dim, 0, size) if size <= have else rows.index_select(dim, repeated)
    if 0 in stride or rows.shape == leaf.shape:
        return rows
    return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device).copy_(rows)


def _check_contract(whole: Capture, variant: Capture, size_range: SizeRange, symbol: str) -> None:
    """What a range's capture relies on must be part of the contract that calls are checked against."""
    if variant.output_spec != whole.output_spec or variant.user_inputs != whole.user_inputs:
        raise refuse(f"the model returns or takes something else for {size_range}; drop that range.")
    # A narrow contract's symbols in the wide one's: with a size fixed, the rest move up.
    names: dict[str, str] = {}
    for wide, narrow in zip(whole.input_spec.leaves, variant.input_spec.leaves, strict=True):
        if wide.tensor is None or narrow.tensor is None:
            if wide != narrow:
                raise refuse(f"argument {wide.path} changes its kind for {size_range}; drop that range.")
            continue
        for dim, (a, b) in enumerate(zip(wide.tensor.shape, narrow.tensor.shape, strict=True)):
            if isinstance(b, int) and not isinstance(a, int) and a != symbol:
                raise refuse(f"{wide.path}.shape[{dim}] is static for {size_range}; drop that range.")
            names[str(b)] = str(a)
    relations = [
        re.sub(r"\bs\d+\b", lambda found: names.get(found[0], "?"), relation)
        for relation in variant.input_spec.constraints
    ]
    more = [relation for relation in relations if relation not in whole.input_spec.constraints]
    if more:
        raise refuse(
            f"for {size_range} the capture relies on {'; '.join(more)} besides the whole range's relations; "
            "drop that range, or choose its ends so that the model takes the same path at every size."
        )
