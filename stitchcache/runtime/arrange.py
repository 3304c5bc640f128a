"""Bring a call's arguments into the form that the capture's example had."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stitchcache.errors import InputMismatchError
from stitchcache.runtime.mismatch import mismatch
from stitchcache.torchside import tree
from stitchcache.torchside.tensors import storage_id
from stitchcache.types import InputSpec


def _other_order(name: str, wanted: list[str], found: list[str]) -> InputMismatchError:
    return mismatch(
        name,
        f"keys in the order {', '.join(map(str, wanted))}",
        ", ".join(map(str, found)),
        "A model may go through them in their order, so it is part of what was compiled.",
    )


class Arrangement:
    """Brings a call's arguments into the form of the capture."""

    def __init__(
        self, spec: InputSpec, forward: Callable[..., Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self.spec = spec
        self._forward = forward
        written = "apart" in spec.constraints
        self._state = frozenset(storage_id(tensor) for tensor in tensors.values()) if written else frozenset()

    def collected(self) -> list[str]:
        """Keywords of the example that the model's ``**kwargs`` collects, in their order."""
        _, keyword = json.loads(self.spec.tree)[1]["children_spec"]
        keys: list[str] = json.loads(keyword["context"] or "[]")
        if len(keys) < 2:
            return []
        try:
            parameters = inspect.signature(self._forward).parameters.values()
        except (TypeError, ValueError):
            return keys
        by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return [key for key in keys if key not in by_name]

    def meets_state(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether an argument shares memory with a tensor of the model."""
        return not self._state.isdisjoint([storage_id(tensor) for tensor in tensors])

    def meeting(self, leaves: Sequence[Any]) -> InputMismatchError | None:
        """Name the argument that does."""
        for leaf, value in zip(self.spec.leaves, leaves, strict=True):
            if leaf.tensor is not None and self.meets_state([value]):
                return mismatch(
                    leaf.path,
                    "memory of its own, because the model writes into an argument or into its own tensors",
                    "memory of a tensor of the model",
                    "Pass a clone.",
                )
        return None

    def take_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flatten a call whose containers only torch knows."""
        leaves, structure = tree.flatten((args, kwargs))
        if tree.dumps(structure) != self.spec.tree:
            args, kwargs = self.arrange(args, kwargs)
            leaves, structure = tree.flatten((args, kwargs))
        if tree.dumps(structure) != self.spec.tree:
            raise self._other_structure(args, kwargs)
        return leaves

    def _other_structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InputMismatchError:
        """Name the first argument that is nested in another way than the example was."""
        positional, keyword = json.loads(self.spec.tree)[1]["children_spec"]
        names = [*tree.positional_names(self._forward, len(args)), *kwargs]
        wanted = [*positional["children_spec"], *keyword["children_spec"]]
        for name, want, value in zip(names, wanted, [*args, *kwargs.values()], strict=False):
            got = json.loads(tree.dumps(tree.flatten(value)[1]))[1]
            if got != want:
                if isinstance(value, dict) and want["type"] == got["type"]:
                    keys, given = json.loads(want["context"]), [*value]
                    if keys != given and sorted(map(repr, keys)) == sorted(map(repr, given)):
                        return _other_order(name, keys, given)
                kind = (
                    "a tensor or plain value"
                    if want["type"] is None
                    else f"a {want['type']} as in the example"
                )
                found = type(value).__qualname__ if got["type"] != want["type"] else "other contents"
                return mismatch(name, kind, found, "Pass it nested as it was when the model was compiled.")
        return mismatch(
            "arguments", "those of the example", f"{len(args)} positional, {sorted(kwargs)} by keyword"
        )

    def arrange(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between positions and keywords, and fill in defaults, as the capture had them."""
        positional, keyword = json.loads(self.spec.tree)[1]["children_spec"]
        count, keys = len(positional["children_spec"]), json.loads(keyword["context"] or "[]")
        try:
            signature = inspect.signature(self._forward)
            given = signature.bind(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise mismatch("arguments", "those of the model's forward", str(error)) from error
        ordered = self.collected()
        found = [key for key in kwargs if key in ordered]
        if len(found) == len(ordered) and found != ordered:
            raise _other_order("keywords", ordered, found)
        given.apply_defaults()
        values: dict[str, Any] = {}
        extra: tuple[Any, ...] = ()
        for name, value in given.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                extra = value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            else:
                values[name] = value
        plain = [
            p.name
            for p in signature.parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        positional_values = [*(values.pop(name) for name in plain[:count]), *extra]
        arranged = {key: values.pop(key) for key in list(keys) if key in values}
        for name, value in values.items():
            default = (
                signature.parameters[name].default
                if name in signature.parameters
                else inspect.Parameter.empty
            )
            if value is not default:
                raise mismatch(
                    name,
                    "nothing: the capture's example did not pass it",
                    type(value).__qualname__,
                    "Compile with an example that passes it.",
                )
        return tuple(positional_values), arranged
