"""How code is written: functions with what they close over, what wraps them, and what classes hold.

Code is known by its bytecode, constants and names, and an installed package's by its place: a lookup checks
its file's digest as well. Bytecode belongs to one Python version, so that version is a factor.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import functools
import os
import sys
import types
from _abc import _get_dump  # type: ignore[import-not-found]
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stitchcache.containers import code_digest, member_state, once
from stitchcache.encoding import SCALARS, Handler, data_bytes, make_factor, text_bytes
from stitchcache.torchside import DYNAMO
from stitchcache.types import Factor

if TYPE_CHECKING:
    from stitchcache.keys.walk import KeyWriter, Walk

_NOT_STATE = frozenset({"__wrapped__", "__signature__", "__doc__", "__annotations__"})
"""Attributes of a function that follow from its closure, or that no call reads."""

_OF_WRAPPERS = _NOT_STATE | frozenset(
    "__module__ __name__ __qualname__ func attrname lock args kwds gen".split()  # noqa: SIM905
)
"""What wrappers copy from their functions, what is written as a part, and what a library keeps for itself."""

_OF_C = {types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType}
_BY_NAME = frozenset({types.MemberDescriptorType, types.GetSetDescriptorType, *_OF_C})


def code_bytes(walk: Walk, code: types.CodeType) -> bytes:
    """What a code object does, in a few bytes; for an installed file's, its place instead."""
    known = walk.codes.get(id(code))
    # An empty entry says that what holds this code speaks for it.
    if known is not None and known[1]:
        return known[1]
    installed = walk.origin(code.co_filename)[1]
    # A line may hold several lambdas, so their place does not say which of them it is.
    if installed and not code.co_name.startswith("<"):
        # The record of a target holds this file's digest if any of it ran, so the place says it all.
        written = b"[place 1:" + text_bytes(f"{installed} {code.co_qualname} {code.co_firstlineno}")
    else:
        written = b"[code digest 1:" + data_bytes(code_digest(code))
    walk.codes[id(code)] = (code, written)
    return written


def _put_function(writer: KeyWriter, function: types.FunctionType) -> None:
    if writer.again(function):
        return
    walk, code, qualname = writer.walk, function.__code__, function.__qualname__
    module = walk.label(function.__module__ or "")
    versioned, installed = walk.origin(code.co_filename)
    if versioned:
        texts = walk.text_bytes(f"{module}.{qualname}") + walk.text_bytes(code.co_qualname)
        writer.out += b"[library function 5:%bi%d;" % (texts, code.co_firstlineno)
        writer.out += _library_defaults(function)
        _put_cells(writer, function)
        return
    named = qualname == code.co_qualname and function.__name__ == code.co_name and code.co_name[0] != "<"
    plain = _plain_defaults(function)
    if installed and named and plain is not None:
        # Most methods of most classes are of this kind, and there are hundreds of them in a model.
        walk.codes.setdefault(id(code), (code, b""))
        texts = b"".join(map(walk.text_bytes, (installed, module, qualname)))
        writer.out += b"[shipped 6:%bi%d;%b" % (texts, code.co_firstlineno, plain)
        _put_cells(writer, function)
        return
    writer.out += b"[function 6:%b%b" % (walk.text_bytes(f"{module}.{qualname}"), code_bytes(walk, code))
    if plain is not None:
        writer.out += plain
    else:
        writer.head(b"defaults", 3)
        writer.put_at(f" default of {qualname}", function.__defaults__)
        writer.put_at(f" default of {qualname}", function.__kwdefaults__)
        writer.put_state(function, _NOT_STATE)
    _put_notes(writer, function, installed)
    _put_cells(writer, function)
    # It follows from the closure where functools.wraps set it, and there alone.
    inner = function.__dict__.get("__wrapped__")
    follows = any(held is inner for held in filled_cells(function))
    writer.put_at(".__wrapped__", None if follows else inner)


def _put_notes(writer: KeyWriter, function: types.FunctionType, installed: str) -> None:
    """Write what code may ask a function about itself, where it does not follow from its code."""
    code = function.__code__
    doc = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else None
    # Packages write texts of their own there: transformers makes them from sets, so they move with the seed.
    declared, text = ({}, doc) if installed else (function.__annotations__, function.__doc__)
    if not declared and function.__name__ == code.co_name and text in (doc, None):
        writer.out += b"N"
        return
    writer.out += b"[notes %d:%b" % (2 + 2 * len(declared), text_bytes(function.__name__))
    writer.put_at(".__doc__", text)
    writer.path.append(".__annotations__")
    writer.put_pairs(declared.items())
    writer.path.pop()


def filled_cells(function: types.FunctionType) -> Iterator[Any]:
    """What a function's cells hold; a cell may be empty."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def _plain_defaults(function: types.FunctionType) -> bytes | None:
    """Defaults of a function in short, where they are scalars and it has no other state."""
    if function.__kwdefaults__ or function.__dict__:
        return None
    defaults = function.__defaults__
    if not defaults:
        return b"[plain 0:"
    try:
        return b"[plain %d:" % len(defaults) + b"".join([SCALARS[type(value)](value) for value in defaults])
    except KeyError:
        return None


def _library_defaults(function: types.FunctionType) -> bytes:
    """Defaults of a function of torch or the library, which somebody may have set; objects by their types."""
    given = [("", value) for value in function.__defaults__ or ()]
    given += (function.__kwdefaults__ or {}).items()
    parts = [b"[defaults of library %d:" % (2 * len(given))]
    for name, value in given:
        scalar = SCALARS.get(type(value))
        parts += text_bytes(name), scalar(value) if scalar else text_bytes(type(value).__qualname__)
    return b"".join(parts)


def _put_cells(writer: KeyWriter, function: types.FunctionType) -> None:
    cells = function.__closure__
    if not cells:
        writer.out += b"[cells 0:"
        return
    writer.head(b"cells", 2 * len(cells))
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        writer.text(name)
        _put_cell(writer, cell, name, f" of {function.__qualname__}")


def _put_cell(writer: KeyWriter, cell: types.CellType, name: str = "", of: str = "") -> None:
    try:
        content = cell.cell_contents
    except ValueError:
        if not writer.again(cell):
            writer.head(b"empty cell", 0)
        return
    if name == "__class__" and isinstance(content, type):
        writer.out += b"[own class 1:" + writer.walk.text_bytes(writer.class_label(content))
        return
    # Two functions may share a cell, and one of them set what the other reads.
    if not writer.again(cell):
        writer.head(b"cell", 1)
        writer.put_at(f" closure cell {name!r}{of}", content)


def _put_method(writer: KeyWriter, method: types.MethodType) -> None:
    # Asking for a bound method makes a new one, so it has no number.
    writer.head(b"method", 2)
    writer.put_at(".__func__", method.__func__)
    writer.put_at(".__self__", method.__self__)


def _put_builtin(writer: KeyWriter, function: Any) -> None:
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or ""
    # Some builds of torch have pybind11's record of a function there. Under its own name it needs no other.
    named = type(owner).__module__ == "pybind11_builtins" and (
        vars(sys.modules.get(module, types)).get(function.__name__) is function
    )
    writer.out += b"[builtin 2:" + writer.walk.text_bytes(f"{module}.{function.__qualname__}")
    writer.put_at(".__self__", None if named or isinstance(owner, types.ModuleType) else owner)


def _put_descriptor(writer: KeyWriter, descriptor: Any) -> None:
    owner = descriptor.__objclass__
    writer.parts(b"descriptor", f"{owner.__module__}.{owner.__qualname__}", descriptor.__name__)


def _put_cached(writer: KeyWriter, wrapper: Any) -> None:
    writer.walk.caches.append((writer.at() or wrapper.__name__, wrapper))
    writer.head(b"lru_cache", 1)
    writer.put_at(".__wrapped__", wrapper.__wrapped__)


def _by_attributes(kind: bytes, *names: str) -> Handler:
    """How to write what wraps a function: its parts by name, then whatever was set on it."""
    steps = [(name, f".{name}") for name in names]

    def put(writer: KeyWriter, item: Any) -> None:
        writer.head(kind, 2 + len(steps))
        writer.put_class(type(item))
        for name, step in steps:
            writer.put_at(step, getattr(item, name))
        writer.put_state(item, _OF_WRAPPERS)

    return once(put)


CACHE = type(functools.lru_cache(lambda: None))
WRAPPED: Mapping[type, tuple[str, ...]] = {
    property: ("fget", "fset", "fdel"),
    functools.cached_property: ("func", "attrname"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    # What contextmanager makes: used as a decorator it starts its generator anew from these at each call.
    type(contextlib.contextmanager(lambda: iter(()))()): ("func", "args", "kwds"),
}
"""What wraps functions, with the attributes that say how."""

_WRAPPERS = {kind: _by_attributes(kind.__name__.encode(), *names) for kind, names in WRAPPED.items()}
HANDLERS: Mapping[type, Handler] = {
    types.CellType: _put_cell,
    types.FunctionType: _put_function,
    types.MethodType: _put_method,
    types.BuiltinFunctionType: _put_builtin,
    types.MethodWrapperType: _put_builtin,
    **dict.fromkeys(_BY_NAME, _put_descriptor),
    **_WRAPPERS,
    CACHE: once(_put_cached),
}
FAMILIES = list(_WRAPPERS.items())

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
    """Write what a class's own body holds: bases, declarations, methods and plain attributes, in order."""
    skipped = _NOT_CONTENT | writer.ignored(cls)
    members: dict[str, Any] | None = None
    if isinstance(cls, enum.EnumMeta):
        found: Mapping[str, Any] = cls.__members__
        members = {name: (item.__dict__["_value_"], member_state(item)) for name, item in found.items()}
        skipped = skipped | _ENUM_INTERNALS | members.keys()
    items = [item for item in cls.__dict__.items() if item[0] not in skipped and not _is_own(cls, *item)]
    writer.out += b"[contents %d:%b" % (6 + 2 * len(items), text_bytes(writer.class_label(cls)))
    writer.put_class(type(cls))
    writer.head(b"bases", len(cls.__bases__))
    for base in cls.__bases__:
        writer.put_class(base)
    registered = [reference() for reference in _get_dump(cls)[0]] if isinstance(cls, abc.ABCMeta) else []
    writer.put(tuple(sorted(writer.class_label(item) for item in registered if item is not None)))
    writer.put_at(".__members__", members)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    installed = writer.walk.origin(file)[1] != ""
    if installed:
        writer.head(b"installed", 0)
    else:
        _put_declarations(writer, cls)
    generated = installed and "__dataclass_params__" in cls.__dict__
    for name, value in items:
        writer.text(name)
        if generated and type(value) is types.FunctionType and _is_generated(writer.walk, value):
            writer.head(b"generated", 0)
        else:
            writer.put_at(f", attribute {name}", value)


def _is_own(cls: type, name: str, value: Any) -> bool:
    """Whether a descriptor made in C came with its class, as a slot's does; another may be put there."""
    return type(value) in _BY_NAME and value.__objclass__ is cls and value.__name__ == name


def _put_declarations(writer: KeyWriter, cls: type) -> None:
    """Write what a class declares of its attributes, for a class whose file nobody may have recorded."""
    declared = cls.__dict__.get("__annotations__")  # noqa: RUF063 - its own, and as they stand
    slots = cls.__dict__.get("__slots__")
    fields = getattr(cls, "__dataclass_fields__", {}) if "__dataclass_fields__" in cls.__dict__ else {}
    writer.head(b"declared", 4 + len(fields))
    writer.put_at(".__annotations__", dict(declared) if isinstance(declared, dict) else None)
    for name in ("__doc__", "__orig_bases__"):
        writer.put_at(f".{name}", cls.__dict__.get(name))
    names = (slots,) if isinstance(slots, str) else tuple(map(str, slots or ()))
    writer.put(None if slots is None else names)
    for name, item in fields.items():
        writer.out += b"[field 5:" + text_bytes(name)
        writer.put((bool(item.init), bool(item.kw_only), bool(item.compare)))
        for part in (item.default, item.default_factory):
            writer.put_at(f".{name}", None if part is dataclasses.MISSING else (part,))
        writer.put_at(f".{name}.metadata", item.metadata)


def _is_generated(walk: Walk, function: types.FunctionType) -> bool:
    """Whether ``dataclass`` generated a method of a class in an installed file, from which it follows."""
    code = function.__code__
    if code.co_filename in _REPR_FILES:
        # A dataclass's __repr__ stands in a wrapper of the library's.
        inner = getattr(function, "__wrapped__", None)
        if type(inner) is types.FunctionType and any(held is inner for held in filled_cells(function)):
            code = inner.__code__
    made = code.co_filename == "<string>" and code.co_qualname.startswith("__create_fn__.<locals>.")
    if made:
        walk.codes.setdefault(id(code), (code, b""))
    return made


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_CALLABLES = (types.FunctionType, types.MethodType, functools.partial, functools.partialmethod)
_LOOKED_INTO = frozenset({*_FUNCTIONS, *_CALLABLES, CACHE, property, staticmethod, classmethod})
# transformers adds this to Module when it makes its first model, to initialise weights. If it were in keys,
# every model would miss in a process that has made one from transformers before.
_ADDED = ("Module.smart_apply", "PreTrainedModel.initialize_weights.<locals>.smart_apply")


def replaced_factor(walk: Walk, factor: str, owners: Iterable[Any]) -> Factor:
    """A factor of functions, methods and plain attributes of torch's that were replaced.

    Also by another function of torch's, which shows in a name that is not its own.
    """
    writer, names = walk.writer(factor), []
    # Thousands of names are looked at: what is as usual is told by its kind, or by its name and file.
    builtin, function = types.BuiltinFunctionType, types.FunctionType
    inert: set[type] = set()
    for owner in owners:
        in_class = isinstance(owner, type)
        prefix = owner.__qualname__ + "." if in_class else ""
        for name, value in vars(owner).items():
            kind = type(value)
            if kind is builtin:
                if value.__name__ == name:
                    continue
            elif kind is function:
                if value.__qualname__ == prefix + name:
                    file = value.__code__.co_filename
                    if walk.origin(file)[0]:
                        continue
                    # dataclass generates methods without a file.
                    if file == "<string>" and hasattr(owner, "__dataclass_params__"):
                        continue
            elif kind in inert:
                continue
            elif (scalar := SCALARS.get(kind)) is not None:
                if in_class and name[:2] != "__":
                    writer.text(f"{prefix}{name}")
                    writer.out += scalar(value)
                continue
            elif kind not in _LOOKED_INTO and (issubclass(kind, type) or walk.is_versioned(kind.__module__)):
                inert.add(kind)
                continue
            if _put_other(writer, f"{owner.__name__}.{name}", value):
                names.append(f"{owner.__name__}.{name}")
    return make_factor(factor, ", ".join(names) or "as shipped", bytes(writer.out))


def _put_other(writer: KeyWriter, name: str, value: Any) -> bool:
    """Write what stands in torch under another name than its own, or wrapped, if it counts."""
    walk, kind = writer.walk, type(value)
    if kind is property or kind is staticmethod or kind is classmethod:
        value = value.fget if kind is property else value.__func__
    if type(value) is CACHE:
        value = value.__wrapped__
    kind = type(value)
    if kind is types.FunctionType and (name, value.__qualname__) == _ADDED:
        return False
    if kind in _FUNCTIONS and (kind is not types.FunctionType or walk.origin(value.__code__.co_filename)[0]):
        # Dynamo wraps Module.__init__ at its first trace, which torch.cond makes too; it only tags modules.
        if not str(getattr(value, "__module__", "")).startswith(f"{DYNAMO}."):
            writer.text(f"{name} {value.__qualname__}")
        return False
    users = callable(value) and not isinstance(value, type) and not walk.is_versioned(kind.__module__)
    if kind in _CALLABLES or users:
        writer.text(name)
        writer.put_at(name, value)
        return True
    return False
