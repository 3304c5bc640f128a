"""Write values as bytes that are equal exactly when the values mean the same.

Every value is written as its type's name and then its content, each part with its length, so that no
two different values have one encoding. Types are exact: 1, 1.0 and True differ, so do 0.0 and -0.0.
Nothing written depends on the hash seed, on memory addresses or on which objects are shared.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import operator
import struct
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from stitchcache.errors import SplitError
from stitchcache.graph import symbols
from stitchcache.graph.effects import target_name
from stitchcache.torchside.modules import TABLES
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of

_BY_REPR = {bool, int, str, type(None), type(Ellipsis), type(NotImplemented), range}
_BY_STR = {torch.dtype, torch.layout, torch.memory_format}
_OPS = (OpOverload, OpOverloadPacket, HigherOrderOperator, types.BuiltinFunctionType, type)
_DEPTH = 100


def type_name(value: Any) -> str:
    """A type's module and name."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


class Encoder:
    """Feeds a hash with tagged, length-prefixed values.

    Attributes:
        symbols: Canonical names of the symbols met so far.
    """

    def __init__(self) -> None:
        self.symbols = symbols.SymbolNames()
        self._hash = hashlib.sha256()
        self._devices: dict[str, int] = {}
        self._active: list[int] = []

    def hexdigest(self) -> str:
        """The digest of everything written so far."""
        return self._hash.hexdigest()

    def bytes(self, data: bytes) -> None:
        """Write bytes with their length."""
        self._hash.update(struct.pack("<q", len(data)))
        self._hash.update(data)

    def text(self, value: str) -> None:
        """Write text with its length."""
        self.bytes(value.encode("utf-8", "surrogatepass"))

    def tag(self, name: str, count: int) -> None:
        """Write what follows, and how many parts it has."""
        self.text(name)
        self._hash.update(struct.pack("<q", count))

    def value(self, value: Any) -> None:
        """Write any value, containers recursively.

        Raises:
            SplitError: It has no canonical form, or refers to itself.
        """
        if id(value) in self._active or len(self._active) > _DEPTH:
            raise _no_form(value, "it refers to itself")
        self._active.append(id(value))
        try:
            self._value(value)
        finally:
            self._active.pop()

    def _value(self, value: Any) -> None:
        kind = type(value)
        if kind in _BY_REPR:
            self.tag(type_name(value), 1)
            self.text(repr(value))
        elif kind in _BY_STR:
            self.tag(type_name(value), 1)
            self.text(str(value))
        elif kind in _FIXED:
            self.tag(type_name(value), 1)
            self.bytes(_FIXED[kind](value))
        elif isinstance(value, symbols.SYMBOLIC):
            self.metadata(value)
        elif isinstance(value, torch.device):
            self.tag("device", 1)
            self.text(self.device(value))
        elif isinstance(value, torch.Tensor):
            self.tensor(value)
        elif isinstance(value, enum.Enum):
            self.tag(type_name(value), 2)
            self.text(value.name)
            self.value(value.value)
        elif isinstance(value, torch.nn.Module):
            self.module(value)
        elif not self._container(value):
            if isinstance(value, (*_OPS, types.FunctionType, types.MethodType, functools.partial)):
                self.function(value)
            else:
                self._opaque(value)

    def _container(self, value: Any) -> bool:
        """Write a container; False if it is none."""
        if isinstance(value, (list, tuple)):
            self.many(_plain_name(value), value)
        elif isinstance(value, dict):
            self.many(_plain_name(value), [part for pair in value.items() for part in pair])
        elif isinstance(value, slice):
            self.many("slice", [value.start, value.stop, value.step])
        elif isinstance(value, (set, frozenset)):
            self.tag(_plain_name(value), len(value))
            for digest in sorted(_digest(item) for item in value):
                self.bytes(digest)
        else:
            return False
        return True

    def many(self, name: str, items: Iterable[Any]) -> None:
        """Write a container's name, length and items."""
        listed = list(items)
        self.tag(name, len(listed))
        for item in listed:
            self.value(item)

    def device(self, device: torch.device) -> str:
        """A device without its index; several of one type are told apart by order of appearance."""
        if ":" not in str(device):
            return device.type
        number = self._devices.setdefault(str(device), len(self._devices))
        first = min(n for name, n in self._devices.items() if name.startswith(f"{device.type}:"))
        return f"{device.type} {number - first}"

    def function(self, target: Any) -> None:
        """Write a function by what it does, as far as that can be known."""
        self.tag("function", 1)
        if isinstance(target, functools.partial):
            self.many("partial", [target.func, target.args, target.keywords])
        elif isinstance(target, types.MethodType):
            self.many("method", [target.__func__, target.__self__])
        elif isinstance(target, types.FunctionType):
            self.text(target_name(target))
            self._python(target)
        elif isinstance(target, _OPS):
            self.text(target_name(target))
            self.text(str(schema_of(target)) if isinstance(target, OpOverload) else "")
        else:
            self._opaque(target)

    def _python(self, function: types.FunctionType) -> None:
        """Code, defaults, closure, and what it reads of its module's globals."""
        if function.__module__ == "torch" or function.__module__.startswith("torch."):
            # torch's version is a factor of every key.
            return
        self.code(function.__code__)
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents)
            except ValueError:
                self.text("empty cell")
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            found = function.__globals__[name]
            self.text(name)
            if isinstance(found, types.ModuleType):
                self.text(found.__name__)
            elif id(found) in self._active:
                self.text("recursion")
            else:
                self.value(found)

    def code(self, code: types.CodeType) -> None:
        """Write a code object without its names for places in files."""
        self.bytes(code.co_code)
        self.value((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
        self.value((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags))
        self.tag("constants", len(code.co_consts))
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                self.code(const)
            else:
                self.value(const)

    def module(self, module: torch.nn.Module) -> None:
        """Write a module that is called as it is: class, code, attributes, and what is below it."""
        key = getattr(module, "stitchcache_key", None)
        self.tag(f"module {type_name(module)}", 1)
        if key is not None:
            self.value(key)
            return
        if not type(module).__module__.startswith("torch."):
            forward: Any = type(module).forward
            self._python(forward)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            self.text(name)
            self.metadata(tensor)
        for name, attribute in sorted(vars(module).items()):
            if name not in TABLES and not _is_empty(attribute):
                self.text(name)
                self.value(attribute)
        self.tag("children", len(module._modules))
        for name, child in module._modules.items():
            self.text(name)
            self.value(child)

    def tensor(self, value: torch.Tensor) -> None:
        """Write a constant tensor, contents included."""
        self.tag("tensor", 1)
        self.metadata(value)
        try:
            plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
            self.bytes(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise _no_form(value, str(error).splitlines()[0]) from error

    def metadata(self, value: Any) -> None:
        """Write what is known of a value before it exists: never a tensor's contents."""
        if isinstance(value, torch.Tensor):
            self.tag("tensor of", 1)
            self.text(f"{value.dtype} {value.layout} {value.is_conj()} {value.is_neg()}")
            self.text(self.device(value.device))
            for sizes in (list(value.shape), list(symbols.stride_of(value))):
                self.tag("sizes", len(sizes))
                for size in sizes:
                    self.metadata(size)
        elif isinstance(value, symbols.SYMBOLIC):
            self.tag(type(value).__name__, 1)
            self.text(symbols.structure(self.symbols.rename(symbols.expression(value))))
        elif isinstance(value, (list, tuple)):
            self.tag("values", len(value))
            for item in value:
                self.metadata(item)
        elif type(value) in _BY_REPR or type(value) in _FIXED:
            self.value(value)
        else:
            self.tag(f"unknown {type_name(value)}", 0)

    def _opaque(self, value: Any) -> None:
        """Write an object by what pickle would take to rebuild it."""
        if isinstance(value, (operator.attrgetter, operator.itemgetter, operator.methodcaller)):
            self.many(type_name(value), value.__reduce__())
            return
        try:
            reduced = value.__reduce_ex__(4)
        except (TypeError, AttributeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise _no_form(value, str(error)) from error
        self.tag(f"object {type_name(value)}", 1)
        if isinstance(reduced, str):
            self.text(reduced)
            return
        rebuild, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        self.value(rebuild)
        self.value(arguments)
        self.value(dict(sorted(state.items())) if type(state) is dict and _all_text(state) else state)
        self.many("items", items or ())
        self.many("pairs", pairs or ())
        call: Any = getattr(type(value), "__call__", None)  # noqa: B004 - its code is wanted
        if isinstance(call, types.FunctionType):
            self._python(call)


def _no_form(value: Any, why: str) -> SplitError:
    return SplitError(
        f"a {type(value).__qualname__} has no canonical form ({why}); the graph cannot be hashed. "
        "Pass plain values, tensors or picklable objects to the op."
    )


def _plain_name(value: Any) -> str:
    """fx wraps lists and dicts in classes of its own; they mean the same."""
    return type_name(value).replace("torch.fx.immutable_collections.immutable_", "builtins.")


def _digest(value: Any) -> bytes:
    encoder = Encoder()
    encoder.value(value)
    return encoder.hexdigest().encode()


def _names(code: types.CodeType) -> set[str]:
    below = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*below)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, set, tuple)) and not value)


def _all_text(state: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) for key in state)


_FIXED: dict[type, Callable[[Any], bytes]] = {
    float: lambda v: struct.pack("<d", v),
    complex: lambda v: struct.pack("<dd", v.real, v.imag),
    bytes: lambda v: v,
    bytearray: bytes,
}
