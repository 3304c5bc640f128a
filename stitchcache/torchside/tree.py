"""Nested arguments and results: flatten, rebuild, write down.

Uses ``torch.utils._pytree``: torch has no public pytree module in the versions that we support.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.utils._pytree as pytree

from stitchcache.errors import EntryFormatError, OptionError

SEEN = ("2.11", "2.13", "2.15")

TreeSpec = pytree.TreeSpec

# Results of topk, max, sort and their kin. Torch takes them apart, and does not write their types down.
_NAMED = "torch.return_types"
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    """Take nested containers apart: the leaves in order, and the structure."""
    return pytree.tree_flatten(value)


def unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """Put leaves back into their containers."""
    return pytree.tree_unflatten(leaves, spec)


def alike(one: TreeSpec, other: TreeSpec) -> bool:
    """Whether two structures are equal, where ``torch.Size`` is a tuple, as torch rebuilds it."""
    if one == other:
        return True
    kinds = {tuple if spec.type is torch.Size else spec.type for spec in (one, other)}
    mine, theirs = one.children(), other.children()
    if len(kinds) > 1 or one.context != other.context or len(mine) != len(theirs):
        return False
    return all(map(alike, mine, theirs))


def dumps(spec: TreeSpec) -> str:
    """Write a structure down; equal structures give equal text in every process.

    Raises:
        OptionError: It holds a container type that was registered without a serialized name.
    """
    try:
        try:
            return pytree.treespec_dumps(spec)
        except NotImplementedError:
            record = json.loads(pytree.treespec_dumps(_as_tuples(spec)))
            _name(record[1], spec)
            return json.dumps(record)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise OptionError(
            f"a container in the arguments or results cannot be written down: {str(error).rstrip('.')}. "
            "Register its type with a name: torch.export.register_dataclass(Type, "
            "serialized_type_name='module.Type') for a dataclass; or pass plain lists, tuples and dicts.",
            option="args",
        ) from error


def loads(text: str) -> TreeSpec:
    """Read what :func:`dumps` wrote.

    Raises:
        EntryFormatError: Not such a text, or it names a container type that this process has not registered.
    """
    try:
        if _NAMED not in text:
            return pytree.treespec_loads(text)
        tuples = re.sub(rf'"{re.escape(_NAMED)}\.\w+"', '"builtins.tuple"', text)
        return _as_named(pytree.treespec_loads(tuples), json.loads(text)[1])
    except (NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
        advice = "If it names a container type, import the module that registers it before loading."
        raise EntryFormatError.at("", "tree", f"it cannot be read: {error}. {advice}") from error


def _as_tuples(spec: TreeSpec) -> TreeSpec:
    if spec.type is None:
        return spec
    kind = tuple if spec.type.__module__ == _NAMED else spec.type
    return TreeSpec(kind, spec.context, [*map(_as_tuples, spec.children())])


def _name(node: dict[str, Any], spec: TreeSpec) -> None:
    """Write the names of named tuples into a record where they are tuples."""
    if spec.type is not None and spec.type.__module__ == _NAMED:
        node["type"] = f"{_NAMED}.{spec.type.__name__}"
    for child, below in zip(node["children_spec"], spec.children(), strict=True):
        _name(child, below)


def _as_named(spec: TreeSpec, node: dict[str, Any]) -> TreeSpec:
    if spec.type is None:
        return spec
    module, _, name = node["type"].rpartition(".")
    kind = getattr(torch.return_types, name) if module == _NAMED else spec.type
    if module == _NAMED and kind.__module__ != _NAMED:
        raise ValueError(f"{name!r} is no named tuple of torch's")
    return TreeSpec(kind, spec.context, [*map(_as_named, spec.children(), node["children_spec"])])


def leaf_paths(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Name every leaf of a call as the caller would write it, such as ``batch['mask']`` or ``args[2]``.

    Raises:
        OptionError: A container was registered without names for what is in it.
    """
    names = positional_names(forward, len(args))
    try:
        keyed, _ = pytree.tree_flatten_with_path((args, kwargs))
    except ValueError as error:
        # torch.export asks for the same names, and fails without.
        raise OptionError(
            f"an argument's container cannot be taken apart by name ({error}); register its class with "
            "torch.utils._pytree.register_pytree_node(..., flatten_with_keys_fn=...).",
            option="args",
        ) from error
    paths = []
    for keys, _leaf in keyed:
        first: Any = keys[1]
        head = names[first.idx] if isinstance(first, pytree.SequenceKey) else str(first.key)
        paths.append(head + pytree.keystr(keys[2:]))
    return paths


def result_paths(value: Any, head: str = "output") -> list[str]:
    """Name every leaf of a result as one reads it, such as ``output['logits']``."""
    try:
        return [head + pytree.keystr(keys) for keys, _leaf in pytree.tree_flatten_with_path(value)[0]]
    except ValueError:
        # A container that was registered without names for what is in it.
        return [f"{head} leaf {index}" for index in range(len(flatten(value)[0]))]


def positional_names(forward: Callable[..., Any], count: int) -> list[str]:
    """Names of the first ``count`` positional parameters; ``args[i]`` where there is no name."""
    function = forward.__func__ if isinstance(forward, MethodType) else forward
    if isinstance(function, FunctionType) and not vars(function):
        # As a signature has them, which takes ten times as long to make. A decorator leaves a mark.
        named: Sequence[str] = function.__code__.co_varnames[: function.__code__.co_argcount]
        names = list(named[function is not forward :])
    else:
        try:
            names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in POSITIONAL]
        except (TypeError, ValueError):
            names = []
    return names[:count] + [f"args[{i}]" for i in range(len(names), count)]
