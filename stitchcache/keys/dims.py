"""Dynamic shapes as keys see them: canonical text, and which dimensions of an input are named.

``torch.export`` is not imported for it: its ``Dim`` objects are known by their class's module and name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stitchcache.keys.values import UnkeyableError
from stitchcache.types import Dim

# Compiled where one is needed: most paths are an argument's name, and compiling takes part of a warm start.
_STEP = r"\[(?P<index>-?\d+)\]|\['(?P<key>[^']*)'\]|\.(?P<name>\w+)"
_HEAD = r"args\[\d+\]|[^.\[]+"


def _is_dim(value: Any) -> bool:
    return isinstance(value, Dim) or any(
        base.__module__ == "torch.export.dynamic_shapes" and base.__name__ in {"Dim", "_DimHint"}
        for base in type(value).__mro__
    )


def dim_text(value: Any) -> str:
    """A ``torch.export.Dim`` as text: name and range, or the kind of hint."""
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
    """Dynamic shapes as canonical text.

    Raises:
        UnkeyableError: They hold something other than containers, numbers and ``Dim`` objects.
    """
    if value is None or type(value) in {int, bool, str}:
        return repr(value)
    if _is_dim(value):
        return dim_text(value)
    if type(value) is dict:
        # Neither names nor numbers of dimensions have an order that export looks at.
        items = sorted((repr(key), shapes_text(item, f"{path}[{key!r}]")) for key, item in value.items())
        return "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(shapes_text(item, f"{path}[{index}]") for index, item in enumerate(value))
        return f"[{inner}]"
    raise UnkeyableError(path, f"a {type(value).__qualname__} cannot be keyed; use dicts, tuples and Dim")


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
