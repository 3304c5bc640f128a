"""Dataclasses that are made quickly. Imports nothing heavy.

The standard decorator compiles up to seven functions a class, about half a millisecond; forty of them
were a third of what importing this package cost, and every warm start pays that. Here all classes share
functions that look at the fields. What comes out is a dataclass for ``dataclasses.replace``, ``asdict``
and ``fields``; type checkers are shown the standard decorator. An instance is made a little slower, and
has a ``__dict__`` where the standard one would have slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
        made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only)(cls)
        own = vars(cls)
        methods: dict[str, Any] = {"__init__": _init, "__repr__": _repr, "__eq__": _eq}
        methods["__hash__"] = _hash if frozen else None
        if frozen:
            methods |= {"__setattr__": _refuse_set, "__delattr__": _refuse_delete}
        if order:
            methods |= {"__lt__": _lt, "__le__": _le, "__gt__": _gt, "__ge__": _ge}
        for name, method in methods.items():
            if name not in own or (name == "__hash__" and "__eq__" not in own):
                type.__setattr__(made, name, method)
        return made  # type: ignore[no-any-return]

    return decorate


def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    state = self.__dict__
    fields = type(self).__dataclass_fields__
    if args:
        names = [name for name, field in fields.items() if not field.kw_only]
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes {len(names)} positional arguments, not {len(args)}")
        for name, value in zip(names, args, strict=False):
            if name in kwargs:
                raise TypeError(f"{type(self).__name__} got {name!r} twice")
            kwargs[name] = value
    for name, field in fields.items():
        if name in kwargs:
            state[name] = kwargs.pop(name)
        elif field.default is not dataclasses.MISSING:
            state[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            state[name] = field.default_factory()
        else:
            raise TypeError(f"{type(self).__name__} needs {name!r}")
    if kwargs:
        raise TypeError(f"{type(self).__name__} has no {', '.join(map(repr, kwargs))}")
    settle = getattr(self, "__post_init__", None)
    if settle is not None:
        settle()


def _repr(self: Any) -> str:
    shown = (
        f"{name}={getattr(self, name)!r}" for name, f in type(self).__dataclass_fields__.items() if f.repr
    )
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _compared(value: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, name) for name, f in type(value).__dataclass_fields__.items() if f.compare)


def _eq(self: Any, other: object) -> Any:
    return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented


def _lt(self: Any, other: object) -> Any:
    return _compared(self) < _compared(other) if type(other) is type(self) else NotImplemented


def _le(self: Any, other: object) -> Any:
    return _compared(self) <= _compared(other) if type(other) is type(self) else NotImplemented


def _gt(self: Any, other: object) -> Any:
    return _compared(self) > _compared(other) if type(other) is type(self) else NotImplemented


def _ge(self: Any, other: object) -> Any:
    return _compared(self) >= _compared(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _refuse_set(self: Any, name: str, value: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
