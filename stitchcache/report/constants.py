"""A consts table in words. Nothing that it names is imported, made or called."""

from __future__ import annotations

import reprlib
from collections import OrderedDict
from typing import Any

from stitchcache.artifact.unpickle import Refused, Unpickler

_LENGTH = 200


class _Named:
    """Stands for a value that is not plain: its words."""

    def __init__(self, words: str) -> None:
        self._words = words[:_LENGTH]

    def __repr__(self) -> str:
        return self._words


class _Words(Unpickler):
    def outside(self, opcode: str, *operands: Any) -> Any:
        match opcode, operands:
            case "GLOBAL" | "STACK_GLOBAL", (str(module), str(name)):
                return _Named(f"{module}.{name}")
            case "REDUCE" | "NEWOBJ", (target, ()) if repr(target) == "collections.OrderedDict":
                # Its items are added one by one.
                return OrderedDict()
            case "REDUCE" | "NEWOBJ", (target, arguments):
                return _Named(_short(target) + _short(arguments))
            case "BINPERSID", (("global", str(module), str(name)),):
                return _Named(f"{module}.{name}")
            case "BINPERSID", (("tensor", _, str(dtype), str(device), tuple(shape), *_),):
                return _Named(f"tensor {dtype}[{', '.join(map(_short, shape[:8]))}] {device}")
            case "BINPERSID", ((str(kind), *rest),):
                return _Named(f"{kind} {' '.join(map(_short, rest[:8]))}")
        return _Named(f"{opcode.lower()} {_short(operands)}")


def shown_consts(data: bytes | None) -> list[str]:
    """The values of a table, a text each; where it cannot be read, why."""
    if data is None:
        return []
    try:
        values = _Words().load(data)
    except Refused as error:
        return [f"(cannot be read: {error})"]
    return [_short(value) for value in values] if type(values) is list else [_short(values)]


def _short(value: object) -> str:
    words = reprlib.Repr()
    words.maxlevel, words.maxstring, words.maxother = 4, _LENGTH, _LENGTH
    return words.repr(value)[:_LENGTH]
