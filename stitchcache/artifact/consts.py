"""The consts table: values of the execution code that have no literal.

The table is a pickled list. What pickle cannot express safely goes through persistent ids, tuples whose first
item says what they are:

    ("global", module, qualname)            function or class of the list in ``globals``; never called here
    ("enum", module, qualname, name, value) enum member, by name, or by value where it has none (flags)
    ("object", module, qualname, by_init, arguments, state)      instance of a class that the user registered
    ("op", qualified name, overload)        torch operator, also higher-order; overload None is the packet
    ("torch", name)                         dtype, layout, memory format, quantization scheme
    ("placement", name, attributes)         DTensor placement
    ("tensor", serial, dtype, device, shape, stride, bytes, flags)
    ("same", serial)                        the tensor of that serial again
"""

from __future__ import annotations

import copyreg
import enum
import io
import pickle
import struct
import sys
from typing import Any, NoReturn

from stitchcache.artifact.const_reader import CONSTRUCTED, is_namedtuple, read_table
from stitchcache.artifact.globals import (
    CONST_TYPES,
    FUNCTION_TYPES,
    PLACEMENTS,
    ForbiddenGlobal,
    Refused,
    name_of,
    torch_value,
)
from stitchcache.errors import EntryFormatError, ForbiddenGlobalError, UnserializableConstError
from stitchcache.types import span

_MADE_IN_PYTHON = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: a class that a user may have written."""
_UNREADABLE = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    AssertionError,
    OverflowError,
    RecursionError,
    MemoryError,
    struct.error,
)


def dump_consts(consts: list[Any]) -> bytes | None:
    """The bytes of a consts table.

    Args:
        consts: Its values.

    Returns:
        ``None`` for an empty table.

    Raises:
        UnserializableConstError: A value cannot be stored; ``type_name`` says of what type, ``path`` which.
    """
    if not consts:
        return None
    for index, value in enumerate(consts):
        _dump(value, f"consts[{index}]")
    data = _dump(consts, "consts")
    try:
        load_consts(data)
    except EntryFormatError as error:
        raise _unserializable(f"its pickle is refused ({error.reason})", "consts", consts) from error
    return data


def load_consts(data: bytes | None, *, path: str = "") -> list[Any]:
    """The values in a consts table. Imports no module but torch.

    Args:
        data: What :func:`dump_consts` gave, or a table of a legacy entry.
        path: The entry's file, for messages.

    Raises:
        EntryFormatError: It is no such table, or needs something that is not listed here or not imported;
            ``reason`` names it.
        ForbiddenGlobalError: It names, or calls, something that is not listed in
        ``stitchcache.artifact.globals``
            and not registered. Nothing of it ran.
    """
    if data is None:
        return []
    if b"torch" in data:
        import torch  # noqa: F401
    try:
        consts = read_table(data)
    except ForbiddenGlobal as error:
        raise ForbiddenGlobalError(
            f"{path or 'entry'}: consts: {error}",
            path=path,
            field="consts",
            reason=str(error),
            module=error.module,
            name=error.name,
        ) from None
    except Refused as error:
        raise _format_error(path, str(error)) from None
    except _UNREADABLE as error:
        raise _format_error(path, f"not a consts table: {error or type(error).__name__}") from error
    if type(consts) is not list:
        raise _format_error(path, f"{type(consts).__name__} where a list is expected")
    return consts


def _format_error(path: str, reason: str) -> EntryFormatError:
    return EntryFormatError(f"{path or 'entry'}: consts: {reason}", path=path, field="consts", reason=reason)


def _unserializable(reason: str, path: str, value: object) -> UnserializableConstError:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return UnserializableConstError(
        f"{path}: a {name} cannot be stored: {reason}; compute it in the model, or pass it as an input",
        path=path,
        type_name=name,
    )


# -- writing -------------------------------------------------------------------------------------


def _dump(value: Any, path: str) -> bytes:
    buffer = io.BytesIO()
    try:
        _Writer(buffer, path).dump(value)
    except UnserializableConstError:
        raise
    except RecursionError as error:
        raise _unserializable("it is nested too deeply", path, value) from error
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise _unserializable(str(error), path, value) from error
    return buffer.getvalue()


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, path: str) -> None:
        super().__init__(file, protocol=4)
        self._path = path
        self._tensors: dict[int, int] = {}
        self._alive: list[Any] = []

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in (int, float, str, bytes, bool, type(None), list, tuple, dict):
            return None
        if isinstance(obj, enum.Enum):
            return self._enum(obj)
        if isinstance(obj, type):
            return ("global", *(name_of(obj) or self._unregistered(obj, obj)))
        if isinstance(obj, FUNCTION_TYPES):
            name = name_of(obj)
            if name is None:
                reason = "a consts table may not hold this function; make it an op of torch.library"
                raise _unserializable(reason, self._path, obj)
            return ("global", *name)
        if kind in CONST_TYPES and not is_namedtuple(kind):
            return self._object(obj)
        torch = sys.modules.get("torch")
        return None if torch is None else self._torch_id(torch, obj)

    def _enum(self, obj: enum.Enum) -> Any:
        name = name_of(type(obj)) or self._unregistered(type(obj), obj)
        member = obj.name if type(obj).__members__.get(obj.name or "") is obj else None
        return ("enum", *name, member, None if member else obj.value)

    def _object(self, obj: Any) -> Any:
        """By its ``__reduce__``, if that calls the class or its ``__new__`` and nothing else."""
        kind = type(obj)
        call, arguments, state, *items = (*obj.__reduce_ex__(2), None, None, None)[:5]
        by_init = call is kind
        if call is copyreg.__newobj__ and arguments[0] is kind:  # type: ignore[attr-defined]
            arguments = arguments[1:]
        elif not by_init:
            raise _unserializable("its __reduce__ calls something else than its class", self._path, obj)
        if any(each is not None for each in items):
            raise _unserializable("its __reduce__ gives items besides state", self._path, obj)
        return ("object", kind.__module__, kind.__qualname__, by_init, tuple(arguments), state)

    def _unregistered(self, kind: type, obj: Any) -> NoReturn:
        where = f"{kind.__module__}.{kind.__qualname__}"
        reason = f"call stitchcache.register_const_type({where}), here and where it is loaded"
        raise _unserializable(reason, self._path, obj)

    def _torch_id(self, torch: Any, obj: Any) -> Any:
        if torch_value(obj):
            return ("torch", str(obj).removeprefix("torch."))
        # Imports torch: only where it is there already.
        from stitchcache.torchside import ops

        if isinstance(obj, (ops.OpOverload, ops.OpOverloadPacket, ops.HigherOrderOperator)):
            return ("op", *ops.qualified_name(obj))
        if isinstance(obj, torch.Tensor):
            return self._tensor(torch, obj)
        if type(obj).__module__ == PLACEMENTS:
            return ("placement", type(obj).__name__, dict(obj.__reduce_ex__(2)[2] or {}))
        return None

    def _tensor(self, torch: Any, tensor: Any) -> Any:
        if id(tensor) in self._tensors:
            return ("same", self._tensors[id(tensor)])
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if not plain or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise _unserializable("only plain strided tensors with data can", self._path, tensor)
        serial = self._tensors[id(tensor)] = len(self._tensors)
        self._alive.append(tensor)
        detached = tensor.detach().resolve_conj().resolve_neg()
        flags = "parameter" if type(tensor) is torch.nn.Parameter else ""
        return (
            "tensor",
            serial,
            str(tensor.dtype).removeprefix("torch."),
            str(tensor.device),
            tuple(detached.shape),
            tuple(detached.stride()),
            _bytes_of(torch, detached),
            flags,
        )

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in CONSTRUCTED or obj is Ellipsis or obj is NotImplemented:
            return NotImplemented
        if is_namedtuple(kind):
            return NotImplemented if kind in CONST_TYPES else self._unregistered(kind, obj)
        torch = sys.modules.get("torch")
        if torch is not None and kind in (torch.device, torch.Size):
            return NotImplemented
        if name_of(kind) is None and kind.__flags__ & _MADE_IN_PYTHON:
            self._unregistered(kind, obj)
        raise _unserializable("its type is none of those that a consts table may hold", self._path, obj)


def _bytes_of(torch: Any, tensor: Any) -> bytes:
    import ctypes

    count = span(tensor.shape, tensor.stride())
    if count == 0:
        return b""
    # The memory that the strides reach over, so that overlapping and padded layouts come back as they were.
    flat = tensor.as_strided((count,), (1,), tensor.storage_offset()).cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), count * flat.element_size())
