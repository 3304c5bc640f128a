"""The consts table: values of the execution code that have no literal.

The table is a pickled list. What pickle cannot express safely goes through persistent ids, tuples whose first
item says what they are: docs/format.md lists them.
"""

from __future__ import annotations

import ctypes
import enum
import io
import pickle
import sys
import types
from typing import Any

from stitchcache.artifact import unpickle
from stitchcache.errors import EntryFormatError, ForbiddenGlobalError, UnserializableConstError
from stitchcache.types import span


def dump_consts(consts: list[Any]) -> bytes | None:
    """The bytes of a consts table, ``None`` for an empty one; an UnserializableConstError if one has none."""
    if not consts:
        return None
    for index, value in enumerate(consts):
        _dump(value, f"consts[{index}]")
    return _dump(consts, "consts")


def load_consts(data: bytes | None, *, path: str = "") -> list[Any]:
    """The values in a consts table, of a legacy entry too. Imports no module but torch.

    Raises:
        EntryFormatError: It is no such table, or needs an operator or a device that is not here.
        ForbiddenGlobalError: It names, or calls, what is neither listed nor registered; nothing of it ran.
    """
    if data is None:
        return []
    if b"torch" in data:
        import torch  # noqa: F401
    try:
        consts = _Reader().load(data)
    except unpickle.Refused as error:
        if not error.names:
            raise EntryFormatError.at(path, "consts", str(error)) from error
        facts = dict(zip(("module", "name"), error.names, strict=True))
        raise ForbiddenGlobalError.at(path, "consts", str(error), **facts) from None
    if type(consts) is not list:
        raise EntryFormatError.at(path, "consts", f"{type(consts).__name__} where a list is expected")
    return consts


def _dump(value: Any, path: str) -> bytes:
    buffer = io.BytesIO()
    try:
        _Writer(buffer, path).dump(value)
        # What a class's own __reduce__ asked for is seen here.
        _Reader().load(buffer.getvalue())
    except UnserializableConstError:
        raise
    except unpickle.Refused as error:
        raise _unserializable(f"its pickle is refused ({error})", path, value) from error
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise _unserializable(str(error), path, value) from error
    return buffer.getvalue()


def _unserializable(reason: str, path: str, value: object) -> UnserializableConstError:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return UnserializableConstError(
        f"{path}: a {name} cannot be stored: {reason}; compute it in the model, or pass it as an input",
        path=path,
        type_name=name,
    )


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, path: str) -> None:
        super().__init__(file, protocol=4)
        self._path = path
        self._tensors: dict[int, tuple[int, Any]] = {}

    def persistent_id(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in (int, float, str, bytes, bool, type(None), list, tuple, dict):
            return None
        named = kind if isinstance(obj, enum.Enum) else obj
        if isinstance(named, (type, types.FunctionType, types.BuiltinFunctionType)):
            name = unpickle.name_of(named)
            if name is None:
                raise self._unlisted(named, obj)
            if named is obj:
                return ("global", *name)
            member = obj.name if kind.__members__.get(obj.name or "") is obj else None
            return ("enum", *name, member, None if member else obj.value)
        torch = sys.modules.get("torch")
        return None if torch is None or unpickle.is_registered(kind) else self._torch_id(torch, obj)

    def _unlisted(self, named: Any, obj: Any) -> UnserializableConstError:
        where = f"{named.__module__}.{named.__qualname__}"
        reason = f"call stitchcache.register_const_type({where}), here and where it is loaded"
        if not isinstance(named, type):
            reason = "a consts table may not hold this function; make it an op of torch.library"
        return _unserializable(reason, self._path, obj)

    def _torch_id(self, torch: Any, obj: Any) -> Any:
        if unpickle.torch_value(obj):
            return ("torch", str(obj).removeprefix("torch."))
        # Imports torch: only where it is there already.
        from stitchcache.torchside import ops

        if isinstance(obj, (ops.OpOverload, ops.OpOverloadPacket, ops.HigherOrderOperator)):
            return ("op", *ops.qualified_name(obj))
        if isinstance(obj, torch.Tensor):
            return self._tensor(torch, obj)
        if type(obj).__module__ == unpickle.PLACEMENTS:
            return ("placement", type(obj).__name__, dict(obj.__reduce_ex__(2)[2] or {}))
        return None

    def _tensor(self, torch: Any, tensor: Any) -> Any:
        if id(tensor) in self._tensors:
            return ("same", self._tensors[id(tensor)][0])
        usual = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not usual or tensor.is_meta or tensor.is_quantized:
            raise _unserializable("only plain strided tensors with data can", self._path, tensor)
        serial = len(self._tensors)
        # With the tensor, which keeps its id taken.
        self._tensors[id(tensor)] = serial, tensor
        plain = tensor.detach().resolve_conj().resolve_neg()
        # The memory that the strides reach over: overlapping and padded layouts come back as they were.
        count = span(plain.shape, plain.stride())
        flat = plain.as_strided((count,), (1,), plain.storage_offset()).cpu().contiguous()
        return (
            "tensor",
            serial,
            str(tensor.dtype).removeprefix("torch."),
            str(tensor.device),
            tuple(plain.shape),
            tuple(plain.stride()),
            ctypes.string_at(flat.data_ptr(), count * flat.element_size()),
            "parameter" if type(tensor) is torch.nn.Parameter else "",
        )

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if unpickle.is_registered(kind) or _called_with(kind) or obj is Ellipsis or obj is NotImplemented:
            return NotImplemented
        if kind.__module__ == "builtins" or unpickle.name_of(kind) is not None:
            reason = "its type is none of those that a consts table may hold"
            raise _unserializable(reason, self._path, obj)
        raise self._unlisted(kind, obj)


# What may be called, with at most how many arguments of which types: not set(range(10**12)).
_CALLED: dict[tuple[str, str], tuple[int, tuple[type, ...]]] = {
    ("builtins", "complex"): (2, (int, float)),
    ("builtins", "bytearray"): (1, (bytes,)),
    ("builtins", "set"): (1, (list, tuple)),
    ("builtins", "frozenset"): (1, (list, tuple)),
    ("builtins", "slice"): (3, (object,)),
    ("builtins", "range"): (3, (int,)),
    ("collections", "OrderedDict"): (0, ()),
    ("torch", "device"): (2, (str, int)),
    ("torch", "Size"): (1, (list, tuple)),
}


def _called_with(kind: type) -> tuple[int, tuple[type, ...]] | None:
    name = kind.__module__, kind.__qualname__
    return _CALLED[name] if name in _CALLED and unpickle.resolve(*name) is kind else None


class _Reader(unpickle.Unpickler):
    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, Any] = {}

    def outside(self, opcode: str, *operands: Any) -> Any:
        match opcode:
            case "GLOBAL" | "STACK_GLOBAL":
                return unpickle.resolve(*operands)
            case "REDUCE" | "NEWOBJ":
                target, arguments = operands
                if type(arguments) is not tuple:
                    raise unpickle.Refused("a call whose arguments are no tuple")
                return self._call(target, *arguments, by_new=opcode == "NEWOBJ")
            case "BUILD":
                return _with_state(*operands)
        return self._persistent(*operands)

    def _call(self, target: Any, *arguments: Any, by_new: bool) -> Any:
        called = _called_with(target) if isinstance(target, type) else None
        if called is not None:
            self.spend(arguments)
            most, kinds = called
            fit = len(arguments) <= most and all(isinstance(each, kinds) for each in arguments)
            items = [item for each in arguments if isinstance(each, (list, tuple)) for item in each]
            if not fit or not all(map(unpickle.is_small, items)):
                raise unpickle.Refused(f"a call of {target.__name__} with arguments that it does not need")
            return target(*arguments)
        if not isinstance(target, type) or not unpickle.is_registered(target):
            name = getattr(target, "__qualname__", type(target).__name__)
            raise unpickle.Refused("is not allowed to be called", getattr(target, "__module__", None), name)
        if issubclass(target, enum.Enum):
            return _member(target, None, *arguments)
        if issubclass(target, tuple) and hasattr(target, "_fields"):
            return tuple.__new__(target, arguments)
        made: Any = target.__new__(target, *arguments) if by_new else target(*arguments)
        if type(made) is not target:
            raise unpickle.Refused(f"{target.__module__}.{target.__qualname__} made a {type(made).__name__}")
        return made

    def _persistent(self, pid: Any) -> Any:
        # The types are part of the patterns: what else stood there might take for ever to hash or to show.
        match pid:
            case ("global", str(module), str(name)):
                return unpickle.resolve(module, name)
            case ("enum", str(module), str(qualname), str() | None as name, value):
                return _member(unpickle.resolve(module, qualname), name, value)
            case ("op", str(qualified), str() | None as overload):
                return _op(qualified, overload)
            case ("torch", str(name)):
                return unpickle.resolve("torch", name)
            case ("placement", str(name), dict(attributes)):
                return unpickle.resolve(unpickle.PLACEMENTS, name)(**attributes)
            case ("same", int(serial)):
                return self._tensors[serial]
            case ("tensor", int(serial), str(), str(), tuple(), tuple(), bytes(), str()):
                self.spend(pid)
                self._tensors[serial] = _tensor(*pid[2:])
                return self._tensors[serial]
        raise unpickle.Refused("a persistent id of no kind that is known here")


def _with_state(target: Any, state: Any) -> Any:
    kind = type(target)
    if not unpickle.is_registered(kind) or isinstance(target, (enum.Enum, tuple)):
        raise unpickle.Refused("is not allowed to be given state", kind.__module__, kind.__qualname__)
    if hasattr(target, "__setstate__"):
        target.__setstate__(state)
        return target
    for attributes in state if type(state) is tuple else (state,):
        for name, value in (attributes or {}).items():
            # A name such as __class__ could make it an instance of another class.
            if type(name) is not str or name.startswith("__"):
                raise unpickle.Refused(f"an attribute {name!r}")
            # Frozen classes set theirs like this too.
            object.__setattr__(target, name, value)
    return target


def _member(kind: Any, name: str | None, value: Any) -> Any:
    if not isinstance(kind, type) or not issubclass(kind, enum.Enum):
        raise unpickle.Refused(f"{getattr(kind, '__qualname__', 'a value')} is no enum")
    if name is None:
        # A flag looks at each bit of an unknown value.
        if not unpickle.is_small(value) or (isinstance(value, int) and value.bit_length() > 64):
            raise unpickle.Refused(f"a value of {kind.__qualname__} that is too large")
        return kind(value)
    if name not in kind.__members__:
        raise unpickle.Refused(f"enum {kind.__module__}.{kind.__qualname__} has no member {name!r} here")
    return kind.__members__[name]


def _op(qualified: str, overload: str | None) -> Any:
    import torch

    # Imports torch, as everything does that has an operator.
    from stitchcache.torchside import ops

    library, _, name = qualified.partition("::")
    shown = qualified if overload is None else f"{qualified}.{overload or 'default'}"
    if name in unpickle.READS_FILES:
        raise unpickle.Refused(f"operator {shown} is not allowed: it reads files")
    try:
        packet = getattr(getattr(torch.ops, library), name)
        found = packet if overload is None else getattr(packet, overload or "default")
    except AttributeError:
        raise unpickle.Refused(f"operator {shown} is not registered: import what registers it") from None
    if not isinstance(found, (ops.OpOverload, ops.OpOverloadPacket, ops.HigherOrderOperator)):
        raise unpickle.Refused(f"{qualified} is no operator")
    return found


def _tensor(dtype: str, device: str, shape: Any, stride: Any, data: bytes, flags: str) -> Any:
    import torch

    kind = unpickle.resolve("torch", dtype)
    fit = len(shape) == len(stride) <= 64
    if not fit or any(type(size) is not int or size < 0 for size in (*shape, *stride)):
        raise unpickle.Refused("a tensor whose shape and strides do not fit together")
    count = span(shape, stride)
    if type(kind) is not torch.dtype or len(data) != count * kind.itemsize:
        raise unpickle.Refused(f"a tensor of {len(data)} bytes, which do not fit dtype, shape and strides")
    try:
        # frombuffer takes no empty buffer.
        flat = torch.frombuffer(bytearray(data or 16), dtype=torch.uint8).view(kind)[:count]
        tensor = flat.to(device).as_strided(shape, stride)
    except (RuntimeError, AssertionError) as error:
        raise unpickle.Refused(f"a tensor on {device}, which this process cannot make: {error}") from error
    return torch.nn.Parameter(tensor, requires_grad=False) if flags == "parameter" else tensor
