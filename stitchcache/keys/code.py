"""Canonical bytes of code: functions with what they close over, and what wraps them.

Code is known by its bytecode, constants and names. File names, line numbers and comments are left out:
they mean nothing to a graph. Bytecode belongs to one Python version, which is why that version is a factor.
Code of an installed package is known by its place, for speed: a lookup checks the file's digest as well.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

from stitchcache.keys.values import SCALARS, Encoder, Handler, text_bytes

_NOT_STATE = frozenset({"__wrapped__", "__signature__", "__doc__", "__annotations__"})
"""Attributes of a function that follow from its closure, or that no call reads."""

BY_NAME = frozenset(
    {
        MemberDescriptorType,
        GetSetDescriptorType,
        WrapperDescriptorType,
        MethodDescriptorType,
        ClassMethodDescriptorType,
    }
)


def code_digest(encoder: Encoder, code: CodeType) -> bytes:
    """32 bytes over what a code object does; for an installed file's, its place instead."""
    known = encoder.shared.codes.get(id(code))
    if known is not None:
        return known[1]
    installed = encoder.shared.origin(code.co_filename)[1]
    if installed:
        # The record of a target holds this file's digest if any of it ran, so the place says it all.
        # Lambdas are the only functions of which several may stand in one place; they go by content.
        place = text_bytes(f"{installed} {code.co_qualname} {code.co_firstlineno}")
        if code.co_name != "<lambda>":
            encoder.shared.codes[id(code)] = (code, place)
            return place
    numbers = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    out = bytearray(repr((numbers, names)).encode("utf-8", "surrogatepass"))
    for part in (code.co_code, code.co_exceptiontable):
        out += b"%d:%s" % (len(part), part)
    for const in code.co_consts:
        _const(encoder, const, out)
    digest = hashlib.sha256(out).digest()
    encoder.shared.codes[id(code)] = (code, digest)
    return digest


def _const(encoder: Encoder, const: Any, out: bytearray) -> None:
    kind = type(const)
    scalar = SCALARS.get(kind)
    if scalar is not None:
        out += scalar(const)
    elif kind is CodeType:
        out += b"K" + code_digest(encoder, const)
    elif kind is tuple or kind is frozenset:
        parts = []
        for item in const:
            part = bytearray()
            _const(encoder, item, part)
            parts.append(bytes(part))
        if kind is frozenset:
            parts.sort()
        out += b"%s%d:" % (b"(" if kind is tuple else b"{", len(parts))
        out += b"".join(parts)
    else:
        raise encoder.error(f"code holds a constant of type {kind.__name__}")


def function_label(encoder: Encoder, function: FunctionType) -> str:
    """A function's name for people and keys, the same in every process."""
    module = function.__module__ or ""
    return f"{encoder.shared.main if module == '__main__' else module}.{function.__qualname__}"


def put_function(encoder: Encoder, function: FunctionType) -> None:
    """Write a function: its code, defaults, attributes and what it closes over."""
    known = encoder.shared.functions.get(id(function))
    if known is not None:
        encoder.out += known[1]
        return
    if id(function) in encoder.active:
        # A function that closes over itself: the name stands for the cycle.
        encoder.out += b"r"
        encoder.text(function_label(encoder, function))
        return
    encoded = b"f" + text_bytes(function_label(encoder, function))
    code = function.__code__
    versioned = encoder.shared.origin(code.co_filename)[0]
    if not versioned:
        encoded += code_digest(encoder, code)
        plain = plain_defaults(function)
        encoded += plain or b""
    stateful = not versioned and plain is None
    if stateful or function.__closure__:
        inner = encoder.fresh()
        inner.active = [*encoder.active, id(function)]
        if stateful:
            _put_state(inner, function)
        if function.__closure__:
            _put_cells(inner, function)
        encoded += hashlib.sha256(inner.out).digest()
    if not encoder.active:
        # Within a cycle the bytes depend on where it was entered; only a whole one may be kept.
        encoder.shared.functions[id(function)] = (function, encoded)
    encoder.out += encoded


def plain_defaults(function: FunctionType) -> bytes | None:
    """Defaults of a function in short, where they are scalars and it has no other state."""
    if function.__kwdefaults__ or function.__dict__:
        return None
    defaults = function.__defaults__
    if not defaults:
        return b"0"
    parts = [b"(%d:" % len(defaults)]
    for value in defaults:
        scalar = SCALARS.get(type(value))
        if scalar is None:
            return None
        parts.append(scalar(value))
    return b"".join(parts)


def _put_state(encoder: Encoder, function: FunctionType) -> None:
    where = f" default of {function.__qualname__}"
    for part in (function.__defaults__, function.__kwdefaults__):
        encoder.put_at(where, part)
    if function.__dict__:
        encoder.put_state(function, _NOT_STATE)


def _put_cells(encoder: Encoder, function: FunctionType) -> None:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        encoder.text(name)
        try:
            content = cell.cell_contents
        except ValueError:
            encoder.out += b"0"
            continue
        if name == "__class__" and isinstance(content, type):
            encoder.put_class(content, contents=False)
            continue
        encoder.put_at(f" closure cell {name!r} of {function_label(encoder, function)}", content)


def put_method(encoder: Encoder, method: MethodType) -> None:
    """Write a bound method: its function and the object it is bound to."""
    encoder.out += b"M"
    encoder.put_at(".__func__", method.__func__)
    encoder.put_at(".__self__", method.__self__)


def put_builtin(encoder: Encoder, function: Any) -> None:
    """Write a function made in C: its name, and the object it is bound to where there is one."""
    encoder.out += b"B"
    encoder.text(f"{function.__module__ or ''}.{function.__qualname__}")
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType):
        encoder.put_at(".__self__", owner)


def put_descriptor(encoder: Encoder, descriptor: Any) -> None:
    """Write an attribute of a class made in C: whose it is, and its name."""
    encoder.out += b"D"
    encoder.text(f"{descriptor.__objclass__.__module__}.{descriptor.__objclass__.__qualname__}")
    encoder.text(descriptor.__name__)


def put_type(encoder: Encoder, cls: type) -> None:
    """Write a class that is a value."""
    encoder.put_class(cls)


def put_module_reference(encoder: Encoder, module: ModuleType) -> None:
    """Write a Python module that is a value, by name.

    Raises:
        UnkeyableError: It is a module that its user may edit or set attributes of.
    """
    if not encoder.shared.is_versioned(module.__name__):
        raise encoder.error(f"the module {module.__name__} is held as a value; import it where it is used")
    encoder.out += b"P"
    encoder.text(module.__name__)


def _put_wrapped(encoder: Encoder, wrapper: Any) -> None:
    encoder.out += b"W"
    encoder.text(type(wrapper).__name__)
    encoder.shared.caches.append(("".join(encoder.path).lstrip(".") or wrapper.__name__, wrapper))
    encoder.put_at(".__wrapped__", wrapper.__wrapped__)


def _put_property(encoder: Encoder, item: property) -> None:
    encoder.out += b"Y"
    for part in (item.fget, item.fset, item.fdel):
        encoder.put_at(".fget", part)


def _put_cached_property(encoder: Encoder, item: functools.cached_property[Any]) -> None:
    encoder.out += b"y"
    encoder.put_at(".func", item.func)


def _put_static(encoder: Encoder, item: Any) -> None:
    encoder.out += b"S"
    encoder.text(type(item).__name__)
    encoder.put_at(".__func__", item.__func__)


def _put_partial(encoder: Encoder, item: Any) -> None:
    encoder.out += b"p"
    encoder.put_at(".func", item.func)
    encoder.put_at(".args", item.args)
    encoder.put_at(".keywords", item.keywords)
    if getattr(item, "__dict__", None):
        encoder.put_state(item)


def _put_context_variable(encoder: Encoder, item: contextvars.ContextVar[Any]) -> None:
    encoder.out += b"l"
    encoder.text(item.name)
    # The variable stands for its value here and now; no value is told apart from any value.
    value = item.get(_UNSET)
    encoder.put_at(".get()", (value,) if value is not _UNSET else ())


def _put_context_manager(encoder: Encoder, item: Any) -> None:
    # Used as a decorator it starts its generator anew from these at each call.
    encoder.out += b"x"
    encoder.put_at(".func", item.func)
    encoder.put_at(".args", item.args)
    encoder.put_at(".kwds", item.kwds)


@contextlib.contextmanager
def _sample() -> Iterator[None]:
    yield


_UNSET: Any = object()

HANDLERS: Mapping[type, Handler] = {
    contextvars.ContextVar: _put_context_variable,
    FunctionType: put_function,
    MethodType: put_method,
    BuiltinFunctionType: put_builtin,
    MethodWrapperType: put_builtin,
    **dict.fromkeys(BY_NAME, put_descriptor),
    type(functools.lru_cache(lambda: None)): _put_wrapped,
    type(_sample()): _put_context_manager,
    property: _put_property,
    functools.cached_property: _put_cached_property,
    staticmethod: _put_static,
    classmethod: _put_static,
    functools.partial: _put_partial,
    functools.partialmethod: _put_partial,
}


def _subclass(write: Handler) -> Handler:
    def put(encoder: Encoder, value: Any) -> None:
        encoder.put_class(type(value))
        write(encoder, value)
        if getattr(value, "__dict__", None):
            encoder.put_state(value, _NOT_STATE)

    return put


FAMILIES: list[tuple[type, Handler]] = [
    (property, _subclass(_put_property)),
    (functools.cached_property, _subclass(_put_cached_property)),
    (staticmethod, _subclass(_put_static)),
    (classmethod, _subclass(_put_static)),
    (functools.partial, _subclass(_put_partial)),
]
"""Subclasses of what wraps functions."""
