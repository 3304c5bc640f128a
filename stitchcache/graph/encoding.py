"""Values of graphs as bytes, with the encoder that keys use (`stitchcache.encoding`).

Two rules differ from keys. Equal values are one value, whichever objects are shared: a fresh trace makes
fresh ones. And sets are written sorted: the op that gets one is named, so their order is not looked at.
Metadata of values that do not exist yet is written too: dtypes, shapes, strides, devices, symbols.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from stitchcache.containers import FAMILIES, HANDLERS, put_code, put_dict, put_list
from stitchcache.encoding import SCALARS, Handler, Writer
from stitchcache.graph import symbols
from stitchcache.graph.effects import target_name
from stitchcache.torchside.ops import HigherOrderOperator, OpOverload, OpOverloadPacket, schema_of
from stitchcache.torchside.state import TABLES


class Encoder(Writer):
    """Writes values of a graph.

    Attributes:
        symbols: Canonical names of the symbols met so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handlers = _HANDLERS
        self.families = _FAMILIES
        self.symbols = symbols.SymbolNames()
        self._devices: dict[str, int] = {}
        self._active: set[int] = set()

    def hexdigest(self) -> str:
        """The digest of everything written so far."""
        return hashlib.sha256(self.out).hexdigest()

    def again(self, value: Any) -> bool:
        """Never: a value counts by what it is, not by which object it is."""
        return False

    def put(self, value: Any) -> None:
        """Write one value.

        Raises:
            UnkeyableError: It has no canonical form, or refers to itself.
        """
        if type(value) in SCALARS:
            super().put(value)
            return
        if id(value) in self._active:
            raise self.error(f"a {type(value).__qualname__} has no canonical form: it refers to itself")
        self._active.add(id(value))
        try:
            super().put(value)
        finally:
            self._active.discard(id(value))

    def parts(self, kind: bytes, *values: Any) -> None:
        """Write a composite of values."""
        self.head(kind, len(values))
        self.put_items(values)

    def named(self, kind: bytes, items: Iterable[tuple[str, Any]]) -> None:
        """Write a composite of names and values, in the order given."""
        listed = list(items)
        self.head(kind, 2 * len(listed))
        for name, value in listed:
            self.text(name)
            self.put_at(f".{name}", value)

    def device(self, device: torch.device) -> str:
        """A device without its index; several of one type are told apart by order of appearance."""
        if ":" not in str(device):
            return device.type
        number = self._devices.setdefault(str(device), len(self._devices))
        first = min(n for name, n in self._devices.items() if name.startswith(f"{device.type}:"))
        return f"{device.type} {number - first}"

    def python(self, function: types.FunctionType) -> None:
        """Code, defaults, closure, and what it reads of its module's globals."""
        module = function.__module__ or ""
        if module == "torch" or module.startswith("torch."):
            self.head(b"torch", 0)  # torch's version is a factor of every key
            return
        self.head(b"python", 5)
        self.code(function.__code__)
        self.put_at(".__defaults__", function.__defaults__)
        self.put_at(".__kwdefaults__", function.__kwdefaults__)
        cells = function.__closure__ or ()
        self.head(b"closure", len(cells))
        for cell in cells:
            try:
                self.put_at(" closure", cell.cell_contents)
            except ValueError:
                self.head(b"empty cell", 0)
        read = sorted(_names(function.__code__) & function.__globals__.keys())
        self.head(b"globals", 2 * len(read))
        for name in read:
            found = function.__globals__[name]
            self.text(name)
            if id(found) in self._active:
                self.head(b"recursion", 0)
            elif isinstance(found, types.ModuleType):
                self.parts(b"import", found.__name__)
            else:
                self.put_at(f" global {name}", found)

    def code(self, code: types.CodeType) -> None:
        """Write a code object without its names for places in files."""
        put_code(self, code, self.code)

    def metadata(self, value: Any) -> None:
        """Write what is known of a value before it exists: never a tensor's contents."""
        if isinstance(value, torch.Tensor):
            self.head(b"tensor of", 4)
            self.text(f"{value.dtype} {value.layout} {value.is_conj()} {value.is_neg()}")
            self.text(self.device(value.device))
            self.metadata(tuple(value.shape))
            self.metadata(symbols.stride_of(value))
        elif isinstance(value, symbols.SYMBOLIC):
            expr = self.symbols.rename(symbols.expression(value))
            self.parts(b"symbol", type(value).__name__, symbols.structure(expr))
        elif isinstance(value, (list, tuple)):
            self.head(b"values", len(value))
            for item in value:
                self.metadata(item)
        elif type(value) in SCALARS:
            self.put(value)
        else:
            self.parts(b"unknown", f"{type(value).__module__}.{type(value).__qualname__}")

    def put_object(self, value: Any) -> None:
        """Write an object: its attributes, or else what pickle takes to rebuild it.

        Raises:
            UnkeyableError: Neither is to be had.
        """
        call: Any = getattr(type(value), "__call__", None)  # noqa: B004 - its code is wanted
        self.head(b"instance", 2)
        if self.layout(type(value))[0]:
            super().put_object(value)
        else:
            try:
                reduced = value.__reduce_ex__(4)
            except (TypeError, AttributeError, ValueError, NotImplementedError, RuntimeError) as error:
                kind = type(value).__qualname__
                raise self.error(f"a {kind} has no canonical form: {error}") from error
            # An iterator over items is taken apart: what it holds counts, not the iterator.
            parts = reduced if isinstance(reduced, str) else [*reduced[:3], *map(_listed, reduced[3:5])]
            self.head(b"reduced", 2)
            self.put_class(type(value))
            self.put_at(".__reduce__", parts)
        if isinstance(call, types.FunctionType):
            self.python(call)
        else:
            self.put(None)


def _listed(items: Iterable[Any] | None) -> list[Any] | None:
    return None if items is None else list(items)


def _names(code: types.CodeType) -> set[str]:
    below = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*below)


def _put_set(encoder: Encoder, value: set[Any] | frozenset[Any]) -> None:
    encoder.head(b"set" if isinstance(value, set) else b"frozenset", len(value))
    alone = []
    for item in value:
        inner = Encoder()
        inner.put(item)
        alone.append(bytes(inner.out))
    encoder.out += b"".join(sorted(alone))


def _put_function(encoder: Encoder, function: types.FunctionType) -> None:
    encoder.head(b"function", 2)
    encoder.text(target_name(function))
    encoder.python(function)


def _put_op(encoder: Encoder, op: Any) -> None:
    schema = str(schema_of(op)) if isinstance(op, OpOverload) else ""
    encoder.parts(b"op", target_name(op), schema)


def _put_tensor(encoder: Encoder, value: torch.Tensor) -> None:
    """A constant tensor, contents included."""
    encoder.head(b"tensor", 2)
    encoder.metadata(value)
    try:
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
        data = plain.view(torch.uint8).numpy().data if plain.numel() else b""
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise encoder.error(f"a {type(value).__qualname__} has no canonical form: {reason}") from error
    encoder.put(hashlib.sha256(data).digest())


def _put_module(encoder: Encoder, module: torch.nn.Module) -> None:
    """A module that is called as it is: class, code, attributes, and what is below it."""
    key = getattr(module, "stitchcache_key", None)
    encoder.head(b"module", 2 if key is not None else 5)
    encoder.put_class(type(module))
    if key is not None:
        encoder.put_at(".stitchcache_key", key)
        return
    forward: Any = type(module).forward
    encoder.python(forward)
    tensors = [*module._parameters.items(), *module._buffers.items()]
    encoder.head(b"tensors", 2 * len(tensors))
    for name, tensor in tensors:
        encoder.text(name)
        encoder.metadata(tensor)
    attributes = sorted(vars(module).items())
    encoder.named(b"attributes", [(k, v) for k, v in attributes if k not in TABLES and not _is_empty(v)])
    encoder.named(b"children", module._modules.items())


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, set, tuple)) and not value)


def _put_str(encoder: Encoder, value: torch.dtype | torch.layout | torch.memory_format) -> None:
    encoder.parts(b"torch value", type(value).__name__, str(value))


_HANDLERS: Mapping[type, Handler] = {
    **HANDLERS,
    **dict.fromkeys((set, frozenset), _put_set),
    **dict.fromkeys((torch.dtype, torch.layout, torch.memory_format), _put_str),
    **dict.fromkeys(symbols.SYMBOLIC, Encoder.metadata),
    **dict.fromkeys(
        (operator.attrgetter, operator.itemgetter, operator.methodcaller),
        lambda encoder, value: encoder.parts(b"getter", *value.__reduce__()),
    ),
    immutable_list: put_list,
    immutable_dict: put_dict,
    torch.Size: lambda encoder, value: encoder.parts(b"size", *value),
    torch.device: lambda encoder, value: encoder.parts(b"device", encoder.device(value)),
    functools.partial: lambda encoder, v: encoder.parts(b"partial", v.func, v.args, v.keywords),
    types.FunctionType: _put_function,
    types.MethodType: lambda encoder, value: encoder.parts(b"method", value.__func__, value.__self__),
}

_FAMILIES: list[tuple[type, Handler]] = [
    (torch.Tensor, _put_tensor),
    (torch.nn.Module, _put_module),
    *((kind, _put_op) for kind in (OpOverload, OpOverloadPacket, HigherOrderOperator, type)),
    *((kind, _put_op) for kind in (types.BuiltinFunctionType, types.MethodDescriptorType)),
    *FAMILIES,
]
