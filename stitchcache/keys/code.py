"""How code is written: functions with what they close over, what wraps them, and what classes hold.

Code is known by its bytecode, constants and names. Bytecode belongs to one Python version, which is why that
version is a factor. Code of an installed package is known by its place, for speed: a lookup checks the file's
digest as well.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import functools
import hashlib
import os
import sys
from _abc import _get_dump  # type: ignore[import-not-found]
from collections.abc import Iterator, Mapping
from types import (
    BuiltinFunctionType,
    CellType,
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

from stitchcache.containers import PlainWriter, member_state, put_code
from stitchcache.encoding import SCALARS, Handler, UnkeyableError, data_bytes, text_bytes
from stitchcache.keys.scope import KeyWriter, Scope

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


def code_bytes(walk: Scope, code: CodeType) -> bytes:
    """What a code object does, in a few bytes; for an installed file's, its place instead."""
    known = walk.codes.get(id(code))
    # An empty entry says that a class's contents speak for this code.
    if known is not None and known[1]:
        return known[1]
    installed = walk.origin(code.co_filename)[1]
    # A line may hold several lambdas, so their place does not say which of them it is.
    if installed and not code.co_name.startswith("<"):
        # The record of a target holds this file's digest if any of it ran, so the place says it all.
        place = b"[place 1:" + text_bytes(f"{installed} {code.co_qualname} {code.co_firstlineno}")
        walk.codes[id(code)] = (code, place)
        return place
    writer = PlainWriter()

    def nested(inner: CodeType) -> None:
        writer.out += code_bytes(walk, inner)

    put_code(writer, code, nested)
    digest = b"[code digest 1:" + data_bytes(hashlib.sha256(writer.out).digest())
    walk.codes[id(code)] = (code, digest)
    return digest


def _function_label(walk: Scope, function: FunctionType) -> str:
    module = function.__module__ or ""
    return f"{walk.main if module == '__main__' else module}.{function.__qualname__}"


def put_function(writer: KeyWriter, function: FunctionType) -> None:
    """Write a function: its code, defaults, attributes and what it closes over."""
    if writer.again(function):
        return
    walk, code = writer.walk, function.__code__
    label = _function_label(walk, function)
    if walk.origin(code.co_filename)[0]:
        writer.head(b"library function", 3)
        writer.text(label)
        writer.text(f"{code.co_qualname} {code.co_firstlineno}")
        _put_cells(writer, function, label)
        return
    writer.head(b"function", 6)
    writer.text(label)
    writer.out += code_bytes(walk, code)
    plain = plain_defaults(function)
    if plain is not None:
        writer.out += b"[plain 1:" + plain
    else:
        writer.head(b"defaults", 3)
        where = f" default of {function.__qualname__}"
        for part in (function.__defaults__, function.__kwdefaults__):
            writer.put_at(where, part)
        writer.put_state(function, _NOT_STATE)
    _put_notes(writer, function)
    _put_cells(writer, function, label)
    # It follows from the closure where functools.wraps set it, and there alone.
    inner = function.__dict__.get("__wrapped__") if function.__dict__ else None
    if inner is None or closes_over(function, inner):
        writer.out += b"N"
    else:
        writer.put_at(".__wrapped__", inner)


def _put_notes(writer: KeyWriter, function: FunctionType) -> None:
    """Write what code may ask a function about itself, where it does not follow from its code."""
    code = function.__code__
    doc = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else None
    installed = writer.walk.origin(code.co_filename)[1]
    # Packages write texts of their own there: transformers makes them from sets, so they move with the seed.
    declared, text = ({}, doc) if installed else (function.__annotations__, function.__doc__)
    if not declared and function.__name__ == code.co_name and text in (doc, None):
        writer.out += b"N"
        return
    writer.head(b"notes", 2 + 2 * len(declared))
    writer.text(function.__name__)
    writer.put_at(".__doc__", text)
    writer.path.append(".__annotations__")
    writer.put_pairs(declared.items())
    writer.path.pop()


def closes_over(function: FunctionType, inner: object) -> bool:
    """Whether one of a function's cells holds an object."""
    for cell in function.__closure__ or ():
        try:
            if cell.cell_contents is inner:
                return True
        except ValueError:
            continue
    return False


def plain_defaults(function: FunctionType) -> bytes | None:
    """Defaults of a function in short, where they are scalars and it has no other state."""
    if function.__kwdefaults__ or function.__dict__:
        return None
    defaults = function.__defaults__
    if not defaults:
        return b"N"
    parts = [b"[tuple %d:" % len(defaults)]
    for value in defaults:
        scalar = SCALARS.get(type(value))
        if scalar is None:
            return None
        parts.append(scalar(value))
    return b"".join(parts)


def _put_cells(writer: KeyWriter, function: FunctionType, label: str) -> None:
    cells = function.__closure__
    if not cells:
        writer.out += b"[cells 0:"
        return
    writer.head(b"cells", 2 * len(cells))
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        writer.text(name)
        _put_cell(writer, cell, name, label)


def _put_cell(writer: KeyWriter, cell: CellType, name: str, label: str) -> None:
    try:
        content = cell.cell_contents
    except ValueError:
        if not writer.again(cell):
            writer.head(b"empty cell", 0)
        return
    if name == "__class__" and isinstance(content, type):
        writer.head(b"own class", 1)
        writer.text(writer.class_label(content))
        return
    # Two functions may share a cell, and one of them set what the other reads.
    if not writer.again(cell):
        writer.head(b"cell", 1)
        writer.put_at(f" closure cell {name!r} of {label}", content)


def _put_bare_cell(writer: KeyWriter, cell: CellType) -> None:
    _put_cell(writer, cell, "cell", "a value")


def _put_method(writer: KeyWriter, method: MethodType) -> None:
    # Asking for a bound method makes a new one, so it has no number.
    writer.head(b"method", 2)
    writer.put_at(".__func__", method.__func__)
    writer.put_at(".__self__", method.__self__)


def _put_builtin(writer: KeyWriter, function: Any) -> None:
    """Write a function made in C: its name, and the object it is bound to where there is one."""
    owner = getattr(function, "__self__", None)
    writer.head(b"builtin", 2)
    writer.text(f"{getattr(function, '__module__', None) or ''}.{function.__qualname__}")
    writer.put_at(".__self__", None if isinstance(owner, ModuleType) else owner)


def _put_descriptor(writer: KeyWriter, descriptor: Any) -> None:
    writer.head(b"descriptor", 2)
    writer.text(f"{descriptor.__objclass__.__module__}.{descriptor.__objclass__.__qualname__}")
    writer.text(descriptor.__name__)


def _put_cached(writer: KeyWriter, wrapper: Any) -> None:
    if writer.again(wrapper):
        return
    writer.walk.caches.append(("".join(writer.path).lstrip(".") or wrapper.__name__, wrapper))
    writer.head(b"lru_cache", 1)
    writer.put_at(".__wrapped__", wrapper.__wrapped__)


def _put_parts(kind: bytes, *names: str) -> Handler:
    """How to write what wraps a function: its parts by name, then whatever was set on it."""
    steps = [(name, f".{name}") for name in names]

    def put(writer: KeyWriter, item: Any) -> None:
        if writer.again(item):
            return
        writer.head(kind, 2 + len(steps))
        writer.put_class(type(item))
        for name, step in steps:
            writer.put_at(step, getattr(item, name))
        writer.put_state(item, _OF_WRAPPERS)

    return put


@contextlib.contextmanager
def _sample() -> Iterator[None]:
    yield


_OF_WRAPPERS = _NOT_STATE | frozenset(
    "__module__ __name__ __qualname__ func attrname lock args kwds gen".split()  # noqa: SIM905
)
"""What wrappers copy from their functions, what is written as a part, and what a library keeps for itself."""

_put_property = _put_parts(b"property", "fget", "fset", "fdel")
_put_cached_property = _put_parts(b"cached property", "func", "attrname")
_put_static = _put_parts(b"static", "__func__")
_put_partial = _put_parts(b"partial", "func", "args", "keywords")
# Used as a decorator it starts its generator anew from these at each call.
_put_context_manager = _put_parts(b"context manager", "func", "args", "kwds")

HANDLERS: Mapping[type, Handler] = {
    CellType: _put_bare_cell,
    FunctionType: put_function,
    MethodType: _put_method,
    BuiltinFunctionType: _put_builtin,
    MethodWrapperType: _put_builtin,
    **dict.fromkeys(BY_NAME, _put_descriptor),
    type(functools.lru_cache(lambda: None)): _put_cached,
    type(_sample()): _put_context_manager,
    functools.partialmethod: _put_partial,
}

FAMILIES: list[tuple[type, Handler]] = [
    (property, _put_property),
    (functools.cached_property, _put_cached_property),
    (staticmethod, _put_static),
    (classmethod, _put_static),
    (functools.partial, _put_partial),
]
"""What wraps functions, and its subclasses."""

_NOT_CONTENT = frozenset(
    """__module__ __dict__ __weakref__ __doc__ __annotations__ __abstractmethods__ _abc_impl __orig_bases__
    __parameters__ __static_attributes__ __firstlineno__ __annotate__ __annotate_func__
    __annotations_cache__ __qualname__ __dataclass_fields__ __dataclass_params__ __slots__ __classcell__
    __type_params__ __signature__ __text_signature__ __required_keys__ __optional_keys__ __readonly_keys__
    __mutable_keys__ __protocol_attrs__ __non_callable_proto_members__""".split()  # noqa: SIM905
)
"""Class attributes that say nothing a method reads, or that are written in another way."""

_ENUM_INTERNALS = frozenset(
    """_member_names_ _member_map_ _value2member_map_ _unhashable_values_ _hashable_values_ _new_member_
    _generate_next_value_ _use_args_ _member_type_ _value_repr_ _unhashable_values_map_
    _boundary_ _flag_mask_ _singles_mask_ _all_bits_ _inverted_ __new__ __new_member__""".split()  # noqa: SIM905
)

_LIBRARY = os.path.dirname(os.__file__)
_REPR_FILES = frozenset(os.path.join(_LIBRARY, name) for name in ("dataclasses.py", "reprlib.py"))
"""Where the wrapper around a dataclass's ``__repr__`` is defined, depending on Python's version."""


def put_class_contents(writer: KeyWriter, cls: type) -> None:
    """Write what a class's own body holds: bases, declarations, methods and plain attributes, in their order.

    Raises:
        UnkeyableError: An attribute cannot be written soundly.
    """
    skipped = _NOT_CONTENT | writer.ignored(cls)
    members: Mapping[str, Any] = {}
    if isinstance(cls, enum.EnumMeta):
        members = cls.__members__
        skipped = skipped | _ENUM_INTERNALS | members.keys()
    items = [
        (name, value)
        for name, value in cls.__dict__.items()
        if name not in skipped and type(value) not in BY_NAME
    ]
    writer.head(b"contents", 6 + 2 * len(items))
    writer.text(writer.class_label(cls))
    writer.put_class(type(cls))
    writer.head(b"bases", len(cls.__bases__))
    for base in cls.__bases__:
        writer.put_class(base)
    if isinstance(cls, abc.ABCMeta):
        registered = [reference() for reference in _get_dump(cls)[0]]
        writer.put(tuple(sorted(writer.class_label(item) for item in registered if item is not None)))
    else:
        writer.out += b"N"
    if isinstance(cls, enum.EnumMeta):
        states = {name: (item.__dict__["_value_"], member_state(item)) for name, item in members.items()}
        writer.put_at(".__members__", states)
    else:
        writer.out += b"N"
    _put_declarations(writer, cls)
    prefix = f"{cls.__qualname__}."
    for name, value in items:
        writer.text(name)
        kind = type(value)
        scalar = SCALARS.get(kind)
        if scalar is not None:
            writer.out += scalar(value)
            continue
        short = None
        if kind is FunctionType:
            short = _as_shipped(writer.walk, cls, prefix + name, value)
        elif kind in _SHORT_WRAPPERS:
            short = _wrapped_as_shipped(writer, cls, prefix + name, value)
        if short is not None:
            writer.out += short
            continue
        before = writer.path
        writer.path = []
        try:
            writer.put(value)
        except UnkeyableError as error:
            raise UnkeyableError(f"class {writer.class_label(cls)}, attribute {name}", str(error)) from error
        writer.path = before


def _put_declarations(writer: KeyWriter, cls: type) -> None:
    """Write what a class declares of its attributes, for a class whose file nobody may have recorded."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    if writer.walk.origin(file)[1]:
        writer.head(b"installed", 0)
        return
    declared = cls.__dict__.get("__annotations__")  # noqa: RUF063 - its own, and as they stand
    fields = cls.__dict__.get("__dataclass_fields__", {})
    writer.head(b"declared", 2 + len(fields))
    writer.put_at(".__annotations__", dict(declared) if isinstance(declared, dict) else None)
    writer.put_at(".__slots__", _slots_text(cls))
    for name, item in fields.items():
        where = f".{name}"
        missing = dataclasses.MISSING
        writer.head(b"field", 5)
        writer.text(name)
        writer.put((bool(item.init), bool(item.kw_only), bool(item.compare)))
        writer.put_at(where, None if item.default is missing else (item.default,))
        writer.put_at(where, None if item.default_factory is missing else (item.default_factory,))
        writer.put_at(f"{where}.metadata", item.metadata)


def _slots_text(cls: type) -> tuple[str, ...] | None:
    slots = cls.__dict__.get("__slots__")
    return None if slots is None else (slots,) if isinstance(slots, str) else tuple(map(str, slots))


def _is_of_dataclass(walk: Scope, cls: type, code: CodeType) -> bool:
    """Whether ``dataclass`` generated this code for a class in an installed file, from which it follows."""
    made = code.co_qualname.startswith("__create_fn__.<locals>.") and "__dataclass_params__" in cls.__dict__
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return made and file is not None and walk.origin(file)[1] != ""


def _as_shipped(walk: Scope, cls: type, qualname: str, function: FunctionType) -> bytes | None:
    """A short form for a method that stands in an installed file where its class does; else ``None``.

    Most methods of most classes are of this kind, and there are hundreds of them in a model.
    """
    code = function.__code__
    made = code
    if code.co_filename in _REPR_FILES and qualname.endswith(".__repr__"):
        # A dataclass's __repr__ stands in a wrapper of the library's.
        inner = getattr(function, "__wrapped__", None)
        made = inner.__code__ if type(inner) is FunctionType and closes_over(function, inner) else code
    if made.co_filename == "<string>" and _is_of_dataclass(walk, cls, made):
        walk.codes.setdefault(id(made), (made, b""))
        return b"[generated 0:"
    if code.co_qualname != qualname or function.__module__ != cls.__module__:
        return None
    if function.__closure__ is not None and code.co_freevars != ("__class__",):
        return None
    defaults = plain_defaults(function)
    installed = walk.origin(code.co_filename)[1]
    if defaults is None or not installed:
        return None
    walk.codes.setdefault(id(code), (code, b""))
    # Hundreds of methods stand in the same few files.
    place = walk.texts.get(installed)
    if place is None:
        place = walk.texts[installed] = text_bytes(installed)
    return b"[shipped 3:i%d;%b%b" % (code.co_firstlineno, place, defaults)


_SHORT_WRAPPERS: Mapping[type, tuple[bytes, tuple[str, ...]]] = {
    property: (b"[shipped property 3:", ("fget", "fset", "fdel")),
    classmethod: (b"[shipped class method 1:", ("__func__",)),
    staticmethod: (b"[shipped static method 1:", ("__func__",)),
}


def _wrapped_as_shipped(writer: KeyWriter, cls: type, qualname: str, wrapper: Any) -> bytes | None:
    """The same for a property, class method or static method around such methods."""
    head, names = _SHORT_WRAPPERS[type(wrapper)]
    known = writer.numbers.known
    parts = [getattr(wrapper, name) for name in names]
    functions = [part for part in parts if part is not None]
    # Somebody may have set an attribute on the wrapper; and what was met before is written as a reference.
    own = getattr(wrapper, "__dict__", None)
    if (own and not own.keys() <= _OF_WRAPPERS) or any(id(item) in known for item in (wrapper, *functions)):
        return None
    shorts = [head]
    for part in parts:
        short = b"N"
        if part is not None:
            found = _as_shipped(writer.walk, cls, qualname, part) if type(part) is FunctionType else None
            if found is None:
                return None
            short = found
        shorts.append(short)
    for item in (wrapper, *functions):
        writer.numbers.add(item, writer.section, writer.where, writer.count)
        writer.count += 1
    return b"".join(shorts)
