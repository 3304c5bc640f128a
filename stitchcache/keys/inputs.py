"""Factors of the example inputs: metadata of tensors, values of everything else.

A size of a dimension that is marked with a named ``Dim`` is left out: ``torch.export`` gives one graph for
the whole range, or refuses. What it does look at stays in: whether the size is 0 or 1, and which of the
named dimensions are equal. Everything else about a tensor counts, and all its strides do unless it is laid
out row by row, where they follow from the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stitchcache.keys.digest import make_factor
from stitchcache.keys.dims import dims_of_leaf, shapes_text, split_path
from stitchcache.keys.encoder import new_encoder
from stitchcache.keys.module_tree import readable
from stitchcache.keys.tensors import is_fake, is_plain_tensor
from stitchcache.keys.values import Shared, UnkeyableError
from stitchcache.types import Factor


def input_factors(
    leaves: Sequence[tuple[str, Any]],
    tree: str,
    dynamic_shapes: Any = None,
    shared: Shared | None = None,
) -> tuple[Factor, ...]:
    """Factors of the inputs that a capture is made with.

    Args:
        leaves: Path and value of each leaf, in tree order.
        tree: The input tree, written down.
        dynamic_shapes: As for ``torch.export.export``.
        shared: Where classes that occur in the inputs are noted.

    Raises:
        UnkeyableError: A leaf or the dynamic shapes cannot be keyed soundly; the reason names it.
    """
    return tuple(_factors(leaves, tree, dynamic_shapes, shared or Shared()))


def _factors(
    leaves: Sequence[tuple[str, Any]], tree: str, dynamic_shapes: Any, shared: Shared
) -> Iterator[Factor]:
    yield make_factor("input.tree", f"{len(leaves)} leaves", tree.encode())
    yield make_factor("input.dynamic_shapes", shapes_text(dynamic_shapes))
    heads = list(dict.fromkeys(split_path(path)[0] for path, _ in leaves))
    sizes: dict[str, set[int]] = {}
    seen: dict[int, str] = {}
    aliases = []
    for position, (path, value) in enumerate(leaves):
        if isinstance(value, torch.Tensor):
            dims = dims_of_leaf(dynamic_shapes, path, heads, value.dim())
            text = _tensor_text(path, value, dims)
            for index, dim in dims.items():
                sizes.setdefault(dim, set()).add(value.shape[index])
            if id(value) in seen:
                aliases.append(f"{path} is {seen[id(value)]}")
            seen.setdefault(id(value), path)
            # Several leaves may have one path by odd keys; the position keeps their names apart.
            yield make_factor(f"input.{position}.{path}", text)
        else:
            encoder = new_encoder(shared, [path])
            encoder.put(value)
            yield make_factor(f"input.{position}.{path}", readable(value), bytes(encoder.out))
    yield make_factor("input.equal_sizes", _equal(sizes))
    yield make_factor("input.aliases", ", ".join(aliases) or "none")


def _tensor_text(path: str, value: torch.Tensor, dims: dict[int, str]) -> str:
    if not is_plain_tensor(value) and not is_fake(value):
        raise UnkeyableError(path, f"a {type(value).__qualname__}, whose metadata does not stand for it")
    if value.layout is not torch.strided or value.is_quantized:
        raise UnkeyableError(path, f"a {value.layout} tensor, whose metadata does not stand for it")
    shape, strides = tuple(value.shape), value.stride()
    by_rows = strides == _row_strides(shape)
    if not by_rows:
        dims = {}
    parts = []
    for index, size in enumerate(shape):
        known = dims.get(index)
        parts.append(str(size) if known is None or size < 2 else known)
        if known is not None and size < 2:
            parts[-1] = f"{size} as {known}"
    layout = "by rows" if by_rows else f"strides {strides}"
    flags = f"offset {value.storage_offset()} conj {value.is_conj()} neg {value.is_neg()}"
    plain = flags == "offset 0 conj False neg False"
    text = f"{str(value.dtype)[6:]} {value.device.type} ({', '.join(parts)}) {layout}"
    return text if plain else f"{text} {flags}"


def _row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _equal(sizes: dict[str, set[int]]) -> str:
    """Which named dimensions have equal sizes in the example, without the sizes themselves.

    A trace may compare two of them. One name with two sizes is an error that export will report.
    """
    groups: dict[int, list[str]] = {}
    for dim, found in sizes.items():
        for size in found:
            groups.setdefault(size, []).append(dim)
    equal = sorted(" = ".join(sorted(group)) for group in groups.values() if len(group) > 1)
    uneven = sorted(f"{dim} is {sorted(found)}" for dim, found in sizes.items() if len(found) > 1)
    return "; ".join(equal + uneven) or "none"
