"""Pytrees as a person writes them, from torch's serialized form."""

from __future__ import annotations

import json
from typing import Any

_MOST = 2000


def tree_text(tree: str, leaves: list[str] | None = None) -> str:
    """A structure such as ``(*, {'mask': *})``.

    Args:
        tree: As ``stitchcache.tree.dumps`` writes it.
        leaves: What to write for each leaf; ``*`` if ``None``.

    Returns:
        The text; the serialized form itself where it is of a kind unknown here.
    """
    try:
        _version, spec = json.loads(tree)
        return _node(spec, iter(leaves) if leaves is not None else None)[:_MOST]
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
        return tree[:_MOST]


def _node(spec: dict[str, Any], leaves: Any) -> str:
    kind = spec["type"]
    if kind is None:
        return next(leaves) if leaves is not None else "*"
    children = [_node(child, leaves) for child in spec["children_spec"]]
    context = spec["context"]
    if kind == "builtins.tuple":
        return f"({', '.join(children)}{',' if len(children) == 1 else ''})"
    if kind == "builtins.list":
        return f"[{', '.join(children)}]"
    if kind == "collections.namedtuple":
        return f"{context.rpartition('.')[2]}({', '.join(children)})"
    keys = json.loads(context) if isinstance(context, str) else None
    if isinstance(keys, list) and len(keys) == len(children):
        fields = ", ".join(f"{key!r}: {child}" for key, child in zip(keys, children, strict=True))
        braces = "{" + fields + "}"
        return braces if kind == "builtins.dict" else f"{kind.rpartition('.')[2]}({braces})"
    return f"{kind.rpartition('.')[2]}({', '.join(children)})"
