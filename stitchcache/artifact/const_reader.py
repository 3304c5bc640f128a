"""Reads a consts table: an interpreter of pickle that knows a few opcodes and calls a few constructors.

The interpreter is the one in Python, because there every opcode can be replaced. Opcodes that are not listed
are refused; those that call something call only :data:`_CONSTRUCTORS`, with arguments that are looked at
first. What a table may cost is bounded: each opcode adds at most one value to the stack and one to the memo,
so the number of opcodes bounds both.
"""

from __future__ import annotations

import collections
import enum
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

from stitchcache.artifact.globals import (
    CONST_TYPES,
    PLACEMENTS,
    ForbiddenGlobal,
    Refused,
    reads_files,
    resolve,
    torch_value,
)
from stitchcache.types import span

_MOST_BYTES = 256 << 20
_MOST_OPCODES = 1 << 20
_MOST_NESTED = 256
_MOST_IN_A_KEY = 1000
_MOST_DIMENSIONS = 64


def read_table(data: bytes) -> Any:
    """What a table holds.

    Raises:
        Refused: It has something that a table may not have.
        Exception: It is no pickle: whatever the interpreter raises.
    """
    if len(data) > _MOST_BYTES:
        raise Refused(f"{len(data)} bytes are more than a table's {_MOST_BYTES}")
    return _Reader(io.BytesIO(data)).load()


def _only(most: int, *kinds: type) -> Callable[[tuple[Any, ...]], bool]:
    return lambda arguments: len(arguments) <= most and all(type(each) in kinds for each in arguments)


_items = _only(1, list, tuple)

# What may be called, and with what: not bytearray(10**12), not set(range(10**12)).
_CONSTRUCTORS: tuple[tuple[Any, Callable[[tuple[Any, ...]], bool]], ...] = (
    (complex, _only(2, int, float)),
    (bytearray, _only(1, bytes)),
    (set, lambda arguments: _items(arguments) and all(map(_is_small, *arguments))),
    (frozenset, lambda arguments: _items(arguments) and all(map(_is_small, *arguments))),
    (slice, lambda arguments: len(arguments) <= 3),
    (range, _only(3, int)),
    (collections.OrderedDict, _only(0)),
)
CONSTRUCTED = tuple(target for target, _ in _CONSTRUCTORS)


def _is_small(value: object) -> bool:
    """Whether a value can be hashed in no time: one that nests a tuple in itself 60 times over cannot."""
    todo, seen = [value], 0
    while todo:
        each = todo.pop()
        seen += 1
        if seen > _MOST_IN_A_KEY:
            return False
        if isinstance(each, (tuple, frozenset)):
            todo += each
    return True


def _torch() -> Any:
    import torch

    return torch


class _Limited:
    """Finds what runs an opcode, and counts."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._left = _MOST_OPCODES

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._left -= 1
        if self._left < 0:
            raise Refused(f"more than {_MOST_OPCODES} opcodes")
        if len(self._reader.metastack) > _MOST_NESTED:
            raise Refused(f"nested deeper than {_MOST_NESTED}")
        found = _OPCODES.get(code)
        if found is None:
            raise Refused(f"opcode {bytes([code])!r}, which a consts table does not need")
        return found


class _Reader(pickle._Unpickler):  # type: ignore[name-defined,misc,unused-ignore]
    stack: list[Any]
    metastack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.dispatch: Any = _Limited(self)  # type: ignore[misc,unused-ignore]
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
        constructors = _CONSTRUCTORS
        torch = sys.modules.get("torch")
        if torch is not None:
            constructors += ((torch.device, _only(2, str, int)), (torch.Size, _items))
        for constructor, fits in constructors:
            # By identity: an `in` would ask the objects themselves.
            if target is constructor:
                if not fits(arguments):
                    raise Refused(f"a call of {target.__name__} with arguments that it does not need")
                return target(*arguments)
        if isinstance(target, type) and target in CONST_TYPES:
            if issubclass(target, enum.Enum) and len(arguments) == 1:
                return self._member(target, None, arguments[0])
            if is_namedtuple(target):
                return tuple.__new__(target, arguments)
        module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
        raise ForbiddenGlobal(str(module), str(name or type(target).__name__), "is not allowed to be called")

    # -- containers: items go only into what the table itself made, and only what is quick to hash is a key

    def load_append(self) -> None:
        value = self.stack.pop()
        self._container(list).append(value)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._container(list).extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def load_setitems(self) -> None:
        self._put(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(items)

    def _put(self, items: list[Any]) -> None:
        target = self._container(dict, collections.OrderedDict)
        for index in range(0, len(items), 2):
            target[_key(items[index])] = items[index + 1]

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._container(set).update(map(_key, items))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(_key, items)))

    def _container(self, *kinds: type) -> Any:
        target = self.stack[-1]
        if type(target) not in kinds:
            raise Refused(f"items added to a {type(target).__name__}")
        return target

    # -- persistent ids

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
        return self._member(kind, name, value)

    def _member(self, kind: Any, name: str | None, value: Any) -> Any:
        if name is None:
            # A flag looks at each bit of an unknown value.
            if not _is_small(value) or (isinstance(value, int) and value.bit_length() > 64):
                raise Refused(f"a value of {kind.__qualname__} that is too large")
            return kind(value)
        if name not in kind.__members__:
            raise Refused(f"enum {kind.__module__}.{kind.__qualname__} has no member {name!r} here")
        return kind.__members__[name]

    def _object(self, module: str, qualname: str, by_init: bool, arguments: Any, state: Any) -> Any:
        """An instance of a registered class, made by nothing but the class's own methods."""
        kind = resolve(module, qualname)
        plain = isinstance(kind, type) and kind in CONST_TYPES and not issubclass(kind, (enum.Enum, tuple))
        if not plain or type(arguments) is not tuple:
            raise ForbiddenGlobal(module, qualname, "is not allowed to be made")
        made: Any = kind(*arguments) if by_init else kind.__new__(kind, *arguments)
        if type(made) is not kind:
            raise Refused(f"{module}.{qualname} made a {type(made).__name__}")
        if state is not None and hasattr(made, "__setstate__"):
            made.__setstate__(state)
            return made
        for attributes in state if type(state) is tuple else (state,):
            for name, value in (attributes or {}).items():
                # A name such as __class__ could make it an instance of another class.
                if type(name) is not str or name.startswith("__"):
                    raise Refused(f"an attribute {name!r}")
                # Frozen classes set theirs like this too.
                object.__setattr__(made, name, value)
        return made

    def _op(self, qualified: str, overload: str | None) -> Any:
        torch = _torch()
        library, _, name = qualified.partition("::")
        shown = qualified if overload is None else f"{qualified}.{overload or 'default'}"
        if reads_files(qualified):
            raise Refused(f"operator {shown} is not allowed: it reads files")
        try:
            packet = getattr(getattr(torch.ops, library), name)
            found = packet if overload is None else getattr(packet, overload or "default")
        except AttributeError:
            raise Refused(
                f"operator {shown} is not registered: import the module that registers it"
            ) from None
        # Imports torch, as everything does that has an operator.
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
        return resolve(PLACEMENTS, name)(**attributes)

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
        fit = len(shape) == len(stride) <= _MOST_DIMENSIONS
        if not fit or any(type(size) is not int or size < 0 for size in (*shape, *stride)):
            raise Refused("a tensor whose shape and strides do not fit together")
        count = span(shape, stride)
        if type(kind) is not torch.dtype or len(data) != count * kind.itemsize:
            raise Refused(f"a tensor of {len(data)} bytes whose dtype, shape and strides need another number")
        try:
            if data:
                flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind)
                tensor = flat.as_strided(shape, stride)
            else:
                tensor = torch.empty_strided(shape, stride, dtype=kind)
            if device != "cpu":
                moved = torch.empty_strided((count,), (1,), dtype=kind, device=device)
                moved.copy_(flat) if data else None
                tensor = moved.as_strided(shape, stride)
        except (RuntimeError, AssertionError) as error:
            raise Refused(f"a tensor on {device}, which this process cannot make: {error}") from error
        if flags == "parameter":
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        self._tensors[serial] = tensor
        return tensor


def is_namedtuple(kind: type) -> bool:
    """Whether a class is made by ``collections.namedtuple`` or ``typing.NamedTuple``, or derives from one."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _key(value: Any) -> Any:
    if not _is_small(value):
        raise Refused("a key or item of a set that is too large")
    return value


_PERSISTENT: dict[str, Callable[..., Any]] = {
    "global": _Reader._global,
    "enum": _Reader._enum,
    "object": _Reader._object,
    "op": _Reader._op,
    "torch": _Reader._torch_constant,
    "placement": _Reader._placement,
    "tensor": _Reader._tensor,
    "same": _Reader._same,
}

# Those that build None, booleans, numbers, text, bytes and containers, and the memo.
_BUILDING = """
    PROTO STOP FRAME MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    FLOAT BINFLOAT BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_LIST EMPTY_TUPLE EMPTY_DICT EMPTY_SET LIST TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT
    BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID"""
_BY_CODE: Any = vars(pickle._Unpickler)["dispatch"]  # type: ignore[attr-defined,unused-ignore]
_OPCODES: dict[int, Callable[[Any], None]] = {
    getattr(pickle, name)[0]: _BY_CODE[getattr(pickle, name)[0]] for name in _BUILDING.split()
}
_OPCODES |= {
    pickle.REDUCE[0]: _Reader.load_reduce,
    pickle.NEWOBJ[0]: _Reader.load_newobj,
    pickle.APPEND[0]: _Reader.load_append,
    pickle.APPENDS[0]: _Reader.load_appends,
    pickle.SETITEM[0]: _Reader.load_setitem,
    pickle.SETITEMS[0]: _Reader.load_setitems,
    pickle.DICT[0]: _Reader.load_dict,
    pickle.ADDITEMS[0]: _Reader.load_additems,
    pickle.FROZENSET[0]: _Reader.load_frozenset,
}
