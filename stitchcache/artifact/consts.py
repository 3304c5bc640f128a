"""The consts table: values of the execution code that have no literal. The one module here that knows torch.

The table is a pickled list. Reading it calls nothing but the constructors listed below and finds nothing but
what is listed below: every opcode that calls is overridden. What pickle cannot express safely goes through
persistent ids, tuples whose first item says what they are:

    ("global", module, qualname)            function or class, its module already imported; never called here
    ("enum", module, qualname, name, value) enum member, by name, or by value where it has none (flags)
    ("op", qualified name, overload)        torch operator, also higher-order; overload None is the packet
    ("torch", name)                         dtype, layout, memory format, quantization scheme
    ("placement", name, attributes)         DTensor placement
    ("tensor", serial, dtype, device, shape, stride, bytes, flags)
    ("same", serial)                        the tensor of that serial again
"""

from __future__ import annotations

import collections
import enum
import io
import pickle
import struct
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from stitchcache.artifact.globals import FUNCTION_TYPES, Refused, name_of, resolve, torch_value
from stitchcache.errors import EntryFormatError, UnserializableConstError
from stitchcache.types import span

# What a table may call while it is read.
_CONSTRUCTORS: tuple[Any, ...] = (complex, bytearray, set, frozenset, slice, range, collections.OrderedDict)
_PLACEMENTS = "torch.distributed.tensor.placement_types"
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
    """
    if data is None:
        return []
    if b"torch" in data:
        _torch()
    try:
        consts = _Reader(io.BytesIO(data)).load()
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
        if isinstance(obj, (type, *FUNCTION_TYPES)):
            name = name_of(obj)
            if name is None:
                raise _unserializable("it cannot be found by a name in an importable module", self._path, obj)
            return ("global", *name)
        torch = sys.modules.get("torch")
        return None if torch is None else self._torch_id(torch, obj)

    def _enum(self, obj: enum.Enum) -> Any:
        name = name_of(type(obj))
        if name is None:
            raise _unserializable("its class is not found in an importable module", self._path, obj)
        member = obj.name if type(obj).__members__.get(obj.name or "") is obj else None
        return ("enum", *name, member, None if member else obj.value)

    def _torch_id(self, torch: Any, obj: Any) -> Any:
        if torch_value(obj):
            return ("torch", str(obj).removeprefix("torch."))
        # Imports torch: only where it is there already.
        from stitchcache.torchside import ops

        if isinstance(obj, (ops.OpOverload, ops.OpOverloadPacket, ops.HigherOrderOperator)):
            return ("op", *ops.qualified_name(obj))
        if isinstance(obj, torch.Tensor):
            return self._tensor(torch, obj)
        if type(obj).__module__ == _PLACEMENTS:
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
        if (
            (isinstance(obj, _CONSTRUCTORS) and type(obj) in _CONSTRUCTORS)
            or obj is Ellipsis
            or obj is NotImplemented
        ):
            return NotImplemented
        if isinstance(obj, tuple) and hasattr(type(obj), "_fields"):
            return NotImplemented
        torch = sys.modules.get("torch")
        if torch is not None and type(obj) in (torch.device, torch.Size):
            return NotImplemented
        raise _unserializable("its type is none of those that a consts table may hold", self._path, obj)


def _bytes_of(torch: Any, tensor: Any) -> bytes:
    import ctypes

    count = span(tensor.shape, tensor.stride())
    if count == 0:
        return b""
    # The memory that the strides reach over, so that overlapping and padded layouts come back as they were.
    flat = tensor.as_strided((count,), (1,), tensor.storage_offset()).cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), count * flat.element_size())


# -- reading -------------------------------------------------------------------------------------


def _torch() -> Any:
    import torch

    return torch


def _refuse_opcode(reader: Any) -> NoReturn:
    raise Refused("an opcode that a consts table does not need")


class _Reader(pickle._Unpickler):  # type: ignore[name-defined,misc,unused-ignore]
    """The interpreter in Python, because there every opcode that calls something can be overridden."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._tensors: dict[int, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        return resolve(module, name)

    def load_reduce(self) -> None:
        arguments, target = self.stack.pop(), self.stack[-1]
        self.stack[-1] = self._call(target, arguments)

    def load_newobj(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        self.append(self._call(target, arguments))

    def _call(self, target: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:
            raise Refused("a call whose arguments are no tuple")
        torch = sys.modules.get("torch")
        # By identity: an `in` would ask the objects themselves.
        allowed = any(target is each for each in _CONSTRUCTORS)
        if torch is not None and not allowed:
            allowed = target is torch.device or target is torch.Size
        if allowed:
            return target(*arguments)
        if isinstance(target, type) and issubclass(target, enum.Enum):
            return target(*arguments)
        if isinstance(target, type) and issubclass(target, tuple) and hasattr(target, "_fields"):
            return tuple.__new__(target, arguments)
        raise Refused(f"global {_shown(target)} is not allowed to be called")

    def load_append(self) -> None:
        value = self.stack.pop()
        self._container(list).append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._container(list).extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._container(dict, collections.OrderedDict)[key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self._container(dict, collections.OrderedDict)
        for index in range(0, len(items), 2):
            target[items[index]] = items[index + 1]

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._container(set).update(items)

    def _container(self, *kinds: type) -> Any:
        target = self.stack[-1]
        if type(target) not in kinds:
            raise Refused(f"items added to a {type(target).__name__}")
        return target

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is not tuple or not pid or type(pid[0]) is not str:
            raise Refused("a persistent id that is no tuple")
        read = _PERSISTENT.get(pid[0])
        if read is None:
            raise Refused(f"a persistent id of unknown kind {pid[0]!r}")
        return read(self, *pid[1:])

    def _global(self, module: str, qualname: str) -> Any:
        return resolve(module, qualname)

    def _enum(self, module: str, qualname: str, name: str | None, value: Any) -> Any:
        kind = resolve(module, qualname)
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            raise Refused(f"{module}.{qualname} is no enum")
        if name is None:
            return kind(value)
        if name not in kind.__members__:
            raise Refused(f"enum {module}.{qualname} has no member {name!r} here")
        return kind.__members__[name]

    def _op(self, qualified: str, overload: str | None) -> Any:
        torch = _torch()
        library, _, name = qualified.partition("::")
        try:
            packet = getattr(getattr(torch.ops, library), name)
            found = packet if overload is None else getattr(packet, overload or "default")
        except AttributeError:
            shown = qualified if overload is None else f"{qualified}.{overload or 'default'}"
            raise Refused(
                f"operator {shown} is not registered: import the module that registers it"
            ) from None
        from stitchcache.torchside import ops

        if not isinstance(found, (ops.OpOverload, ops.OpOverloadPacket, ops.HigherOrderOperator)):
            raise Refused(f"{qualified} is no operator")
        return found

    def _torch_constant(self, name: str) -> Any:
        found = getattr(_torch(), name, None)
        if not torch_value(found):
            raise Refused(f"torch.{name} is no dtype, layout or memory format here")
        return found

    def _placement(self, name: str, attributes: dict[str, Any]) -> Any:
        module = sys.modules.get(_PLACEMENTS)
        if module is None:
            raise Refused(f"placement {name} needs module 'torch.distributed.tensor': import it first")
        kind = getattr(module, name, None)
        if not (isinstance(kind, type) and issubclass(kind, module.Placement)):
            raise Refused(f"{_PLACEMENTS}.{name} is no placement here")
        return kind(**attributes)

    def _same(self, serial: int) -> Any:
        return self._tensors[serial]

    def _tensor(
        self,
        serial: int,
        dtype: str,
        device: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        data: bytes,
        flags: str,
    ) -> Any:
        torch = _torch()
        kind = self._torch_constant(dtype)
        if any(type(size) is not int or size < 0 for size in (*shape, *stride)) or len(shape) != len(stride):
            raise Refused("a tensor whose shape and strides do not fit together")
        if type(kind) is not torch.dtype or len(data) != span(shape, stride) * kind.itemsize:
            raise Refused(f"a tensor of {len(data)} bytes whose dtype, shape and strides need another number")
        if data:
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind)
            tensor = flat.as_strided(shape, stride)
        else:
            tensor = torch.empty_strided(shape, stride, dtype=kind)
        if device != "cpu":
            try:
                moved = torch.empty_strided((span(shape, stride),), (1,), dtype=kind, device=device)
                moved.copy_(flat) if data else None
                tensor = moved.as_strided(shape, stride)
            except (RuntimeError, AssertionError) as error:
                raise Refused(f"a tensor on {device}, which this process cannot use: {error}") from error
        if flags == "parameter":
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        self._tensors[serial] = tensor
        return tensor


def _shown(target: Any) -> str:
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    # os.system says that it is posix.system, which is nothing that anybody wrote in a file.
    return f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else type(target).__name__


_PERSISTENT: dict[str, Callable[..., Any]] = {
    "global": _Reader._global,
    "enum": _Reader._enum,
    "op": _Reader._op,
    "torch": _Reader._torch_constant,
    "placement": _Reader._placement,
    "tensor": _Reader._tensor,
    "same": _Reader._same,
}

for _opcode, _method in (
    (pickle.REDUCE, _Reader.load_reduce),
    (pickle.NEWOBJ, _Reader.load_newobj),
    (pickle.APPEND, _Reader.load_append),
    (pickle.APPENDS, _Reader.load_appends),
    (pickle.SETITEM, _Reader.load_setitem),
    (pickle.SETITEMS, _Reader.load_setitems),
    (pickle.ADDITEMS, _Reader.load_additems),
):
    _Reader.dispatch[_opcode[0]] = _method
for _opcode in (
    pickle.BUILD,
    pickle.INST,
    pickle.OBJ,
    pickle.NEWOBJ_EX,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.PERSID,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
):
    _Reader.dispatch[_opcode[0]] = _refuse_opcode
