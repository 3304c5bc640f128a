"""Factors of the example inputs: metadata of tensors, values of everything else.

A size of a dimension that is marked with a named ``Dim`` is left out: ``torch.export`` gives one graph for
the whole range, or refuses. What it does look at stays in: whether the size is 0 or 1, and which of the
named dimensions are equal. Everything else about a tensor counts, and all its strides do unless it is laid
out row by row, where they follow from the sizes.

``torch.export`` is not imported for it: its ``Dim`` objects are known by their class's module and name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stitchcache.encoding import UnkeyableError, make_factor, text_bytes
from stitchcache.keys.model import memory_factor, readable
from stitchcache.keys.scope import Scope
from stitchcache.keys.tensors import is_fake, is_plain_tensor, own_attributes, tensor_span
from stitchcache.keys.walk import Walk
from stitchcache.types import Dim, Factor

# Compiled where one is needed: most paths are an argument's name, and compiling takes part of a warm start.
_STEP = r"\[(?P<index>-?\d+)\]|\['(?P<key>[^']*)'\]|\.(?P<name>\w+)"
_HEAD = r"args\[\d+\]|[^.\[]+"


def _is_dim(value: Any) -> bool:
    return isinstance(value, Dim) or any(
        base.__module__ == "torch.export.dynamic_shapes" and base.__name__ in {"Dim", "_DimHint"}
        for base in type(value).__mro__
    )


def dim_text(value: Any) -> str:
    """A ``torch.export.Dim`` as text: name and range, or the kind of hint. A name is an identifier."""
    hint = getattr(value, "type", None)
    if hint is not None and hasattr(hint, "name"):
        return f"Dim.{hint.name}(min={value.min}, max={value.max})"
    root = getattr(value, "root", None)
    of = f" of {dim_text(root)}" if root is not None else ""
    largest = "int_oo" if value.max is None else value.max
    return f"Dim({value.__name__!r}, min={value.min}, max={largest}){of}"


def named_dim(value: Any) -> str | None:
    """Text of a named ``Dim``, for which export promises one graph over its whole range; else ``None``.

    Hints (``Dim.AUTO``, ``Dim.DYNAMIC``) let export narrow the range by the example, so they don't count.
    """
    if not _is_dim(value) or not isinstance(getattr(value, "__name__", None), str):
        return None
    return None if hasattr(value, "value") else dim_text(value)


def shapes_text(value: Any, path: str = "dynamic_shapes") -> str:
    """Dynamic shapes as canonical text; keys and texts in JSON's form.

    Raises:
        UnkeyableError: They hold something other than containers, numbers and ``Dim`` objects.
    """
    if value is None or type(value) in {int, bool, str}:
        return json.dumps(value)
    if _is_dim(value):
        return dim_text(value)
    if type(value) is dict:
        # Neither names nor numbers of dimensions have an order that export looks at.
        items = sorted(
            (_key_text(key, path), shapes_text(item, f"{path}[{key!r}]")) for key, item in value.items()
        )
        return "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(shapes_text(item, f"{path}[{index}]") for index, item in enumerate(value))
        return f"[{inner}]"
    raise UnkeyableError(path, f"a {type(value).__qualname__} cannot be keyed; use dicts, tuples and Dim")


def _key_text(key: Any, path: str) -> str:
    if type(key) not in {int, str}:
        raise UnkeyableError(
            path, f"a {type(key).__qualname__} as a key; use names and numbers of dimensions"
        )
    return json.dumps(key)


def dims_of_leaf(dynamic_shapes: Any, path: str, heads: Sequence[str], rank: int) -> dict[int, str]:
    """Named dimensions of one tensor among the inputs.

    Args:
        dynamic_shapes: As the user gave them.
        path: The leaf's path, such as ``batch['mask']``.
        heads: First parts of all paths in order, each once: the arguments.
        rank: The tensor's number of dimensions.

    Returns:
        Dimension to text. Empty where there are none, and where the shapes cannot be matched with the path
        beyond doubt: the example's sizes then count as fixed, which is always right.
    """
    head, steps = split_path(path)
    if steps is None:
        return {}
    if isinstance(dynamic_shapes, dict):
        spec = dynamic_shapes.get(head)
    elif isinstance(dynamic_shapes, (list, tuple)) and len(dynamic_shapes) == len(heads):
        spec = dynamic_shapes[heads.index(head)]
    else:
        return {}
    found: Any = spec
    for step in steps:
        in_dict = isinstance(found, dict) and step in found
        in_list = isinstance(found, (list, tuple)) and isinstance(step, int) and 0 <= step < len(found)
        if not in_dict and not in_list:
            return {}
        found = found[step]
    return _dims(found, rank)


def _dims(spec: Any, rank: int) -> dict[int, str]:
    pairs: Any = ()
    if isinstance(spec, dict):
        pairs = spec.items()
    elif isinstance(spec, (list, tuple)) and len(spec) == rank:
        pairs = enumerate(spec)
    found: dict[int, str] = {}
    for index, dim in pairs:
        if type(index) is not int or not 0 <= index < rank:
            return {}
        text = named_dim(dim)
        if text is not None:
            found[index] = text
    return found


def split_path(path: str) -> tuple[str, list[int | str] | None]:
    """Split a leaf's path into the argument and the steps below it; ``None`` where it cannot be read."""
    if path.isidentifier():
        return path, []
    match = re.match(_HEAD, path)
    if match is None:
        return path, None
    position, steps = match.end(), []
    while position < len(path):
        step = re.compile(_STEP).match(path, position)
        if step is None:
            return match.group(), None
        index, key, name = step.group("index", "key", "name")
        steps.append(int(index) if index is not None else key if key is not None else name)
        position = step.end()
    return match.group(), steps


def input_factors(
    leaves: Sequence[tuple[str, Any]],
    tree: str,
    dynamic_shapes: Any = None,
    walk: Scope | None = None,
) -> tuple[Factor, ...]:
    """Factors of the inputs that a capture is made with.

    Args:
        leaves: Path and value of each leaf, in tree order.
        tree: The input tree, written down.
        dynamic_shapes: As for ``torch.export.export``.
        walk: The walk over the whole key; the model comes before its inputs.

    Raises:
        UnkeyableError: A leaf or the dynamic shapes cannot be keyed soundly; the reason names it.
    """
    return tuple(_factors(leaves, tree, dynamic_shapes, walk or Walk()))


def _factors(
    leaves: Sequence[tuple[str, Any]], tree: str, dynamic_shapes: Any, walk: Scope
) -> Iterator[Factor]:
    yield make_factor("input.tree", f"{len(leaves)} leaves", tree.encode())
    yield make_factor("input.dynamic_shapes", shapes_text(dynamic_shapes))
    heads = list(dict.fromkeys(split_path(path)[0] for path, _ in leaves))
    sizes: dict[str, set[int]] = {}
    aliases = []
    for position, (path, value) in enumerate(leaves):
        # Several leaves may have one path by odd keys; the position keeps their names apart.
        name = f"input.{position}.{path}"
        if isinstance(value, torch.Tensor):
            dims = dims_of_leaf(dynamic_shapes, path, heads, value.dim())
            text = _tensor_text(path, value, dims)
            for index, dim in dims.items():
                sizes.setdefault(dim, set()).add(value.shape[index])
            known = walk.numbers.known.get(id(value))
            if known is not None:
                aliases.append(f"{name} is {walk.numbers.place(value)}")
            else:
                walk.numbers.add(value, "input", str(position), 0)
                _note_memory(walk, name, value)
            notes = walk.writer("input attributes", str(position), [path])
            notes.put_pairs(own_attributes(value).items() if value.__dict__ else ())
            yield make_factor(name, text, text_bytes(text) + notes.out)
        else:
            writer = walk.writer("input value", str(position), [path])
            writer.put(value)
            yield make_factor(name, readable(value), bytes(writer.out))
    yield make_factor("input.equal_sizes", _equal(sizes))
    yield make_factor("input.aliases", ", ".join(aliases) or "none")
    yield memory_factor(walk, "input.memory")


def _note_memory(walk: Scope, name: str, value: torch.Tensor) -> None:
    if is_plain_tensor(value) and value.device.type != "meta" and (span := tensor_span(value)):
        start = value.data_ptr()
        walk.spans.append((start, start + span, name))


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
