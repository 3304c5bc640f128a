"""The encoder with every handler in place: plain values, code, torch, numpy, operators."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from stitchcache.keys import classes, code, plain, tensors
from stitchcache.keys.modules import ignored_names, put_module
from stitchcache.keys.values import Encoder, Handler, Shared, UnkeyableError

_HANDLERS: dict[type, Handler] = {**plain.HANDLERS, **code.HANDLERS, **tensors.HANDLERS}


def _put_operator(encoder: Encoder, value: Any) -> None:
    encoder.out += b"A"
    encoder.text(str(value))


def _put_any(encoder: Encoder, value: Any) -> None:
    """Write an instance of any other class."""
    cls = type(value)
    if hasattr(cls, "__members__") and cls.__module__.partition(".")[0] == "torch":
        # An enumeration made in C++, such as SDPBackend.
        encoder.out += b"g"
        encoder.text(f"{cls.__module__}.{cls.__qualname__}.{value.name}")
        return
    ignored = ignored_names(cls)
    if not encoder.shared.layout(cls)[0]:
        encoder.put_object(value)
        return
    if not encoder.again(value):
        encoder.out += b"O"
        encoder.put_class(cls)
        encoder.put_state(value, ignored)


def _families() -> list[tuple[type, Handler]]:
    families: list[tuple[type, Handler]] = [
        (type, code.put_type),
        *tensors.FAMILIES,
        (torch.nn.Module, put_module),
        (type(torch.ops.aten.add.Tensor), _put_operator),
        (type(torch.ops.aten.add), _put_operator),
        (ModuleType, code.put_module_reference),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        families += [
            (numpy.ndarray, tensors.put_numpy),
            (numpy.generic, tensors.put_numpy),
            (numpy.dtype, tensors.put_numpy_dtype),
        ]
    families += plain.late_families()
    return [*families, *code.FAMILIES, *plain.FAMILIES, (object, _put_any)]


def new_encoder(shared: Shared, path: Sequence[str] = ()) -> Encoder:
    """An encoder that writes anything that can be keyed.

    Args:
        shared: What the encoders of one key have in common.
        path: Where its first value stands.
    """
    if not shared.families:
        shared.families += _families()
    return Encoder(_HANDLERS, shared.families, put_contents, shared, path)


def put_contents(encoder: Encoder, cls: type) -> None:
    """Write what a class's body holds, but for notes that say nothing of what it computes."""
    classes.put_class_contents(encoder, cls, ignored_names(cls))


def class_contents(shared: Shared, cls: type) -> bytes:
    """The bytes of a class's contents; each class is looked at once a key.

    Raises:
        UnkeyableError: One of its attributes cannot be written soundly.
    """
    known = shared.contents.get(id(cls))
    if known is None:
        encoder = new_encoder(shared)
        put_contents(encoder, cls)
        known = shared.contents[id(cls)] = (cls, bytes(encoder.out))
    return known[1]


__all__ = ["UnkeyableError", "class_contents", "new_encoder"]
