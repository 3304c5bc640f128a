"""Dataclasses that are made quickly. Imports nothing heavy.

The standard decorator compiles up to seven functions a class, about half a millisecond; forty of them
were a third of what importing this package cost, and every warm start pays that. Here all classes share
functions that look at the fields. What comes out is a dataclass for ``dataclasses.replace``, ``asdict``
and ``fields``, which is when its fields are made; type checkers are shown the standard decorator. An instance
has a ``__dict__`` where the standard one would have slots.
"""

from __future__ import annotations

import dataclasses
import operator
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def dataclass(
    *, frozen: bool = False, slots: bool = False, kw_only: bool = False, order: bool = False
) -> Callable[[type[T]], type[T]]:
    """Like ``dataclasses.dataclass``, for the arguments that this package uses.

    Args:
        frozen: Attributes cannot be set or deleted, and instances can be hashed.
        slots: Accepted, and without effect.
        kw_only: All fields are given by keyword.
        order: Instances of one class compare as the tuples of their fields.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = cls
        own = vars(cls)
        methods: dict[str, Any] = {"__init__": _init, "__repr__": _repr, "__eq__": _eq}
        methods["__hash__"] = _hash if frozen else None
        if frozen:
            methods |= {"__setattr__": _refuse_set, "__delattr__": _refuse_delete}
        if order:
            methods |= {f"__{name}__": _ordered(getattr(operator, name)) for name in ("lt", "le", "gt", "ge")}
        plan = _Plan(made, kw_only)
        for name, method in methods.items():
            if name not in own or (name == "__hash__" and "__eq__" not in own):
                type.__setattr__(made, name, method)
        type.__setattr__(made, "_record_plan", plan)
        type.__setattr__(made, "__dataclass_fields__", _Fields(made, kw_only))
        return made  # type: ignore[no-any-return]

    return decorate


class _Plan:
    """What instances of a class are made of; read from the class before anything is changed in it."""

    __slots__ = ("compared", "defaults", "factories", "names", "positional", "shown")

    def __init__(self, cls: Any, kw_only: bool) -> None:
        above: _Plan | None = getattr(cls, "_record_plan", None)
        self.names: dict[str, None] = dict(above.names) if above else {}
        self.positional: list[str] = list(above.positional) if above else []
        self.defaults: dict[str, Any] = dict(above.defaults) if above else {}
        self.factories: dict[str, Callable[[], Any]] = dict(above.factories) if above else {}
        self.shown: list[str] = list(above.shown) if above else []
        self.compared: list[str] = list(above.compared) if above else []
        own = vars(cls)
        for name in own.get("__annotations__", {}):
            value = own.get(name, dataclasses.MISSING)
            if name in self.names:
                raise TypeError(f"{cls.__name__} redefines {name!r}, which a class above it has")
            self.names[name] = None
            given = value if isinstance(value, dataclasses.Field) else None
            if given is not None and given.default_factory is not dataclasses.MISSING:
                self.factories[name] = given.default_factory
            default = value if given is None else given.default
            if default is not dataclasses.MISSING:
                self.defaults[name] = default
            by_keyword = given.kw_only if given is not None else dataclasses.MISSING
            if not (kw_only if by_keyword is dataclasses.MISSING else by_keyword):
                self.positional.append(name)
            if given is None or given.repr:
                self.shown.append(name)
            if given is None or given.compare:
                self.compared.append(name)


class _Fields:
    """Stands for ``__dataclass_fields__`` until somebody asks; then the standard library makes them."""

    __slots__ = ("_cls", "_kw_only", "_mutex")

    def __init__(self, cls: Any, kw_only: bool) -> None:
        self._cls, self._kw_only, self._mutex = cls, kw_only, threading.Lock()

    def __get__(self, instance: object, owner: Any) -> Any:
        with self._mutex:
            found = vars(self._cls)["__dataclass_fields__"]
            if found is self:
                make = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=self._kw_only)
                found = vars(make(self._cls))["__dataclass_fields__"]
        return found


def defaults_of(cls: Any) -> dict[str, Any]:
    """Field names to defaults, of the fields that have one that all instances share."""
    plan: _Plan = cls._record_plan
    return plan.defaults


def names_of(cls: Any) -> Iterable[str] | None:
    """Field names of a class made here, in their order; ``None`` for any other class."""
    plan: _Plan | None = getattr(cls, "_record_plan", None)
    return None if plan is None else plan.names


def fill(cls: type[T], values: dict[str, Any]) -> T:
    """An instance with these values and no other check; the dict becomes its own.

    For decoding, where the values were checked one by one.
    """
    made = object.__new__(cls)
    object.__setattr__(made, "__dict__", values)
    return made


def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    plan: _Plan = type(self)._record_plan
    if args or kwargs.keys() != plan.names.keys():
        kwargs = _completed(type(self).__name__, plan, args, kwargs)
    self.__dict__.update(kwargs)
    check = getattr(self, "__post_init__", None)
    if check is not None:
        check()


def _completed(name: str, plan: _Plan, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Every field's value, from arguments and defaults."""
    if len(args) > len(plan.positional):
        raise TypeError(f"{name} takes {len(plan.positional)} positional arguments, not {len(args)}")
    values = dict(zip(plan.positional, args, strict=False))
    for field, value in given.items():
        if field in values:
            raise TypeError(f"{name} got {field!r} twice")
        values[field] = value
    complete = {}
    for field in plan.names:
        if field in values:
            complete[field] = values.pop(field)
        elif field in plan.defaults:
            complete[field] = plan.defaults[field]
        elif field in plan.factories:
            complete[field] = plan.factories[field]()
        else:
            raise TypeError(f"{name} needs {field!r}")
    if values:
        raise TypeError(f"{name} has no {', '.join(map(repr, values))}")
    return complete


def _repr(self: Any) -> str:
    shown = (f"{name}={getattr(self, name)!r}" for name in type(self)._record_plan.shown)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _compared(value: Any) -> tuple[Any, ...]:
    return tuple([getattr(value, name) for name in type(value)._record_plan.compared])


def _eq(self: Any, other: object) -> Any:
    return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, object], Any]:
    def method(self: Any, other: object) -> Any:
        return compare(_compared(self), _compared(other)) if type(other) is type(self) else NotImplemented

    return method


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _refuse_set(self: Any, name: str, value: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
