"""Dataclasses that are made quickly. Imports nothing heavy.

The standard decorator compiles up to seven functions a class, half a millisecond; every warm start would pay
that forty times. Here all classes share functions that look at the fields. What comes out is a dataclass for
``dataclasses.replace``, ``asdict`` and ``fields``, and for type checkers the standard one; an instance has a
``__dict__`` where the standard one would have slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")

# Kinds of fields: the text of a record's annotation says how its values are read and checked.
Digest = str  # 64 lowercase hex digits: see is_digest
Name = str  # at most 65,536 characters, which a person may read: names, labels, paths
Expression = str  # arithmetic over symbols: at most 16,384 characters, and no number of more than 20 digits
Count = int  # from 0 to 2**63 - 1
Length = int  # how many things there are: from 0 to 2**20, because all of them are held in memory
Seconds = float  # finite; at most 250 thousand million, so that a time has a date
Amount = float  # finite and not negative
Size = int | str  # a Count, or an Expression
Shape = tuple[Size, ...]  # one size a dimension; at most 64
Scalar = bool | int | float | str | None


def _quick_dataclass(
    *, frozen: bool = False, slots: bool = False, kw_only: bool = False
) -> Callable[[type[T]], type[T]]:
    """Like ``dataclasses.dataclass``, for the arguments that this package uses; ``slots`` has no effect."""

    def decorate(cls: type[T]) -> type[T]:
        made: Any = cls
        own = vars(cls)
        methods: dict[str, Any] = {"__init__": _init, "__repr__": _repr, "__eq__": _eq}
        methods["__hash__"] = _hash if frozen else None
        if frozen:
            methods |= {"__setattr__": _refuse_change, "__delattr__": _refuse_change}
        made.__dataclass_fields__ = _Fields(made, kw_only)
        for name, method in methods.items():
            if name not in own or (name == "__hash__" and "__eq__" not in own):
                type.__setattr__(made, name, method)
        return made  # type: ignore[no-any-return]

    return decorate


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    dataclass = _quick_dataclass


class _Fields:
    """Stands for the fields of a class until they are asked for: a warm start needs a few classes' only."""

    def __init__(self, cls: Any, kw_only: bool) -> None:
        self._cls, self._kw_only = cls, kw_only

    def __get__(self, instance: object, owner: type) -> dict[str, Any]:
        found = _fields(self._cls, self._kw_only)
        type.__setattr__(self._cls, "__dataclass_fields__", found)
        return found


def _fields(cls: Any, kw_only: bool) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(super(cls, cls), "__dataclass_fields__", {}))
    own = vars(cls)
    for name, annotation in own.get("__annotations__", {}).items():
        value = own.get(name, dataclasses.MISSING)
        field: Any = value if isinstance(value, dataclasses.Field) else dataclasses.field(default=value)
        # By this mark the standard library knows fields from class variables.
        field._field_type = dataclasses._FIELD  # type: ignore[attr-defined]
        field.name, field.type = name, annotation
        if field.kw_only is dataclasses.MISSING:
            field.kw_only = kw_only
        fields[name] = field
    return fields


def fill(cls: type[T], values: dict[str, Any]) -> T:
    """An instance with these values, which were checked one by one; the dict becomes its own."""
    made = object.__new__(cls)
    object.__setattr__(made, "__dict__", values)
    return made


def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    fields = self.__dataclass_fields__
    if args or kwargs.keys() != fields.keys():
        kwargs = _filled(type(self).__name__, fields, args, kwargs)
    self.__dict__.update(kwargs)
    check = getattr(self, "__post_init__", None)
    if check is not None:
        check()


def _filled(cls: str, fields: dict[str, Any], args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Every field's value, from arguments and defaults."""
    positional = [name for name, field in fields.items() if not field.kw_only]
    if len(args) > len(positional):
        raise TypeError(f"{cls} takes {len(positional)} positional arguments, not {len(args)}")
    values = dict(zip(positional, args, strict=False))
    wrong = [name for name in given if name in values or name not in fields]
    if wrong:
        raise TypeError(f"{cls} has no {wrong[0]!r}, or got it twice")
    values |= given
    for name, field in fields.items():
        if name not in values:
            if field.default is not dataclasses.MISSING:
                values[name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                values[name] = field.default_factory()
            else:
                raise TypeError(f"{cls} needs {name!r}")
    return values


def _repr(self: Any) -> str:
    shown = (f"{name}={getattr(self, name)!r}" for name, f in self.__dataclass_fields__.items() if f.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _compared(value: Any) -> tuple[Any, ...]:
    return tuple([getattr(value, name) for name, f in value.__dataclass_fields__.items() if f.compare])


def _eq(self: Any, other: object) -> Any:
    return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _refuse_change(self: Any, name: str, value: Any = None) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot change field {name!r}")
