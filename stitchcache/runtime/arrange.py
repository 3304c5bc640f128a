"""Bring a call's arguments into the form that the capture's example had."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from stitchcache.errors import InputMismatchError
from stitchcache.runtime.mismatch import mismatch
from stitchcache.torchside import tree
from stitchcache.types import InputSpec


class Arrangement:
    """Brings a call's arguments into the form of the capture."""

    def __init__(self, spec: InputSpec, forward: Callable[..., Any]) -> None:
        self.spec = spec
        self._forward = forward

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
        ordered = [*(values.pop(name) for name in plain[:count]), *extra]
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
        return tuple(ordered), arranged
