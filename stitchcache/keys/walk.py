"""One walk over the whole of what a key covers, with a handler for every type that can be keyed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from stitchcache import containers
from stitchcache.encoding import Handler
from stitchcache.keys import code, library, tensors
from stitchcache.keys.scope import KeyWriter, Scope
from stitchcache.torchside.ops import CustomOpDef, custom_op_parts


class Walk(Scope):
    """One walk, with one numbering of all objects that it meets."""

    def new_handlers(self) -> Mapping[type, Handler]:
        """How values of exactly these types are written."""
        return _HANDLERS

    def new_families(self) -> Sequence[tuple[type, Handler]]:
        """How values of these types and their subclasses are written; the first match wins."""
        return [
            (type, _put_type),
            *tensors.FAMILIES,
            (type(torch.ops.aten.add.Tensor), _put_operator),
            (type(torch.ops.aten.add), _put_operator),
            (CustomOpDef, _put_custom_op),
            (ModuleType, _put_module_reference),
            *library.late_families(),
            *code.FAMILIES,
            *library.FAMILIES,
            *containers.FAMILIES,
            (object, _put_member_of_torch),
        ]

    def put_contents(self, writer: KeyWriter, cls: type) -> None:
        """Write what a class's body holds."""
        code.put_class_contents(writer, cls)

    def ignored(self, cls: type) -> frozenset[str]:
        """Attributes that say where a class or its instances came from, not what they compute."""
        return tensors.ignored_names(cls)


def _put_type(writer: KeyWriter, cls: type) -> None:
    """Write a class that is a value."""
    writer.put_class(cls)


def _put_module_reference(writer: KeyWriter, module: ModuleType) -> None:
    """Write a Python module that is a value, by name.

    Raises:
        UnkeyableError: It is a module that its user may edit or set attributes of.
    """
    if not writer.walk.is_versioned(module.__name__):
        raise writer.error(f"the module {module.__name__} is held as a value; import it where it is used")
    writer.head(b"module", 1)
    writer.text(module.__name__)


def _put_operator(writer: KeyWriter, value: Any) -> None:
    writer.head(b"operator", 1)
    writer.text(str(value))


def _put_custom_op(writer: KeyWriter, value: Any) -> None:
    """Write an op made with ``torch.library.custom_op``, which a model may call by its object."""
    if writer.again(value):
        return
    parts = custom_op_parts(value)
    writer.head(b"custom op", 2 * len(parts))
    writer.put_pairs(parts.items())


def _put_member_of_torch(writer: KeyWriter, value: Any) -> None:
    """Write any other value; enumerations made in C++, such as SDPBackend, are known by their names."""
    cls = type(value)
    if hasattr(cls, "__members__") and cls.__module__.partition(".")[0] == "torch":
        writer.head(b"torch member", 1)
        writer.text(f"{cls.__module__}.{cls.__qualname__}.{value.name}")
        return
    writer.put_object(value)


_HANDLERS: Mapping[type, Handler] = {
    **containers.HANDLERS,
    **library.HANDLERS,
    **code.HANDLERS,
    **tensors.HANDLERS,
}


def plain_bytes(value: Any) -> bytes:
    """Bytes of one value that stands alone, such as an option.

    Raises:
        UnkeyableError: It cannot be written soundly.
    """
    writer = Walk().writer("value")
    writer.put(value)
    return bytes(writer.out)
