"""Canonical bytes of what a class's own body holds: bases, methods, attributes and declarations."""

from __future__ import annotations

import abc
import enum
import os
import sys
from _abc import _get_dump  # type: ignore[import-not-found]
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

from stitchcache.keys.code import BY_NAME, plain_defaults
from stitchcache.keys.plain import member_state
from stitchcache.keys.values import SCALARS, Encoder, UnkeyableError

_NOT_CONTENT = frozenset(
    """__module__ __dict__ __weakref__ __doc__ __annotations__ __abstractmethods__ _abc_impl __orig_bases__
    __parameters__ __static_attributes__ __firstlineno__ __annotate__ __annotate_func__
    __annotations_cache__ __qualname__ __dataclass_fields__ __dataclass_params__ __slots__ __classcell__
    __type_params__ __signature__ __text_signature__""".split()  # noqa: SIM905
)
"""Class attributes that say nothing a method reads, or that follow from the rest of the class."""

_ENUM_INTERNALS = frozenset(
    """_member_names_ _member_map_ _value2member_map_ _unhashable_values_ _hashable_values_ _new_member_
    _generate_next_value_ _use_args_ _member_type_ _value_repr_ _unhashable_values_map_
    _boundary_ _flag_mask_ _singles_mask_ _all_bits_ _inverted_ __new__ __new_member__""".split()  # noqa: SIM905
)

_LIBRARY = os.path.dirname(os.__file__)
_REPR_FILES = frozenset(os.path.join(_LIBRARY, name) for name in ("dataclasses.py", "reprlib.py"))
"""Where the wrapper around a dataclass's ``__repr__`` is defined, depending on Python's version."""


def put_class_contents(encoder: Encoder, cls: type, ignored: frozenset[str] = frozenset()) -> None:
    """Write what a class's own body holds: bases, methods and plain attributes.

    Args:
        encoder: Where to.
        cls: The class.
        ignored: Names of attributes to leave out.

    Raises:
        UnkeyableError: An attribute cannot be written soundly.
    """
    encoder.text(encoder.class_label(cls))
    encoder.put_class(type(cls))
    for base in cls.__bases__:
        encoder.put_class(base)
    contents: dict[str, Any] = dict(cls.__dict__)
    skipped = _NOT_CONTENT | ignored
    if isinstance(cls, enum.EnumMeta):
        skipped = skipped | _ENUM_INTERNALS | cls.__members__.keys()
        members: Mapping[str, Any] = cls.__members__
        contents["<members>"] = {
            name: (member.value, member_state(member)) for name, member in members.items()
        }
    if isinstance(cls, abc.ABCMeta):
        registered = (reference() for reference in _get_dump(cls)[0])
        for label in sorted(encoder.class_label(item) for item in registered if item is not None):
            encoder.text(label)
    if not encoder.shared.origin(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")[1]:
        _put_declarations(encoder, cls)
    prefix = f"{cls.__qualname__}."
    for name in sorted(contents.keys() - skipped):
        value = contents[name]
        kind = type(value)
        if kind in BY_NAME:
            continue
        encoder.text(name)
        scalar = SCALARS.get(kind)
        if scalar is not None:
            encoder.out += scalar(value)
            continue
        if kind is FunctionType and (short := _as_shipped(encoder, cls, prefix + name, value)):
            encoder.out += short
            continue
        try:
            encoder.put(value)
        except UnkeyableError as error:
            raise UnkeyableError(f"class {encoder.class_label(cls)}, attribute {name}", str(error)) from error


def _put_declarations(encoder: Encoder, cls: type) -> None:
    """Write what a class declares of its attributes, for a class whose file nobody may have recorded."""
    declared = cls.__dict__.get("__annotations__", {})  # noqa: RUF063 - its own, and as they stand
    for name, kind in declared.items() if isinstance(declared, dict) else ():
        encoder.text(name)
        encoder.text(
            kind if isinstance(kind, str) else getattr(kind, "__qualname__", type(kind).__qualname__)
        )
    for name, item in cls.__dict__.get("__dataclass_fields__", {}).items():
        encoder.text(name)
        encoder.put((bool(item.init), bool(item.kw_only), bool(item.compare)))
        encoder.put_at(f".{name}.metadata", item.metadata)


def _is_of_dataclass(encoder: Encoder, cls: type, code: CodeType) -> bool:
    """Whether ``dataclass`` generated this code for a class in an installed file, from which it follows."""
    made = code.co_qualname.startswith("__create_fn__.<locals>.") and "__dataclass_params__" in cls.__dict__
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return made and file is not None and encoder.shared.origin(file)[1] != ""


def _wraps(function: FunctionType, inner: FunctionType) -> bool:
    """Whether a wrapper closes over the function that it says it wraps."""
    return any(cell.cell_contents is inner for cell in function.__closure__ or ())


def _as_shipped(encoder: Encoder, cls: type, qualname: str, function: FunctionType) -> bytes | None:
    """A short form for a method that stands in an installed file where its class does; else ``None``.

    Most methods of most classes are of this kind, and there are hundreds of them in a model.
    """
    code = function.__code__
    made = code
    if code.co_filename in _REPR_FILES and qualname.endswith(".__repr__"):
        # A dataclass's __repr__ stands in a wrapper of the library's.
        inner = getattr(function, "__wrapped__", None)
        made = inner.__code__ if type(inner) is FunctionType and _wraps(function, inner) else code
    if made.co_filename == "<string>" and _is_of_dataclass(encoder, cls, made):
        encoder.shared.codes.setdefault(id(made), (made, b""))
        return b"i"
    if code.co_qualname != qualname or function.__module__ != cls.__module__:
        return None
    if function.__closure__ is not None and code.co_freevars != ("__class__",):
        return None
    defaults = plain_defaults(function)
    installed = encoder.shared.origin(code.co_filename)[1]
    if defaults is None or not installed:
        return None
    encoder.shared.codes.setdefault(id(code), (code, b""))
    return b"k%d:%s;" % (code.co_firstlineno, installed.encode()) + defaults
