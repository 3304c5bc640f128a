"""Calls of models that choose among parts held by name, as LoRA layers do among adapters.

A trace has the part that was chosen then, and goes on with it. So a call looks whether the model still
chooses it, at the first and the last such module of each class: a model may have hundreds, which are switched
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from operator import attrgetter
from typing import Any

import torch

from stitchcache.errors import InputMismatchError
from stitchcache.state import modules_of
from stitchcache.torchside import INTERNALS

PARTS = (torch.nn.ModuleDict, torch.nn.ParameterDict)


class _Choice:
    """What one module's plain attributes say of its parts, and what they said when it was bound."""

    __slots__ = ("known", "module", "names", "path", "read")

    def __init__(self, path: str, module: torch.nn.Module, names: list[str]) -> None:
        self.path, self.module, self.names = path, module, names
        # The class comes along so that it is a tuple even for one name.
        self.read = attrgetter("__class__", *names)
        self.known = deepcopy(self.read(module))

    def look_again(self) -> None:
        """Raise if another part is chosen; take over what was added, and is not chosen."""
        now = self.read(self.module)
        for name, was, found in zip(self.names, self.known[1:], now[1:], strict=True):
            kept = {key: found.get(key) for key in was} if type(was) is type(found) is dict else found
            if kept != was:
                raise InputMismatchError(
                    f"{self.path}{name} was {was!r} when the model was compiled, and is {found!r} now. "
                    "Compile the model for it, or switch it back.",
                    argument=f"{self.path}{name}",
                    expected=repr(was),
                    actual=repr(found),
                )
        self.known = deepcopy(now)


def over_choices(function: Callable[..., Any], model: torch.nn.Module) -> Callable[..., Any]:
    """A function that raises ``InputMismatchError`` where a model chooses other parts than it does now."""
    choices: dict[tuple[type, bool], _Choice] = {}
    for path, module in modules_of(model):
        if names := _choosing(module):
            last = (type(module), False) in choices
            choices[type(module), last] = _Choice(path, module, names)
    watched = tuple(choices.values())

    def checked(*args: Any) -> Any:
        for choice in watched:
            if choice.read(choice.module) != choice.known:
                choice.look_again()
        return function(*args)

    return checked if watched else function


def _choosing(module: torch.nn.Module) -> list[str]:
    """Plain attributes of a module of which one names parts that it holds; none where no attribute does."""
    held = [child for child in module._modules.values() if isinstance(child, PARTS)]
    parts = {key for child in held for key in child}
    plain = {name: value for name, value in _attributes(module) if _is_plain(value, parts)} if parts else {}
    named = (
        {value} if type(value) is str else value for value in plain.values() if type(value) not in _SWITCHES
    )
    return [*plain] if any(some and parts.issuperset(some) for some in named) else []


_SWITCHES = (bool, float, dict)


def _is_plain(value: Any, parts: set[str]) -> bool:
    """Whether a value may be a choice: a name or several, a switch, or a setting for each part."""
    if type(value) in (list, tuple, set):
        return all(type(item) is str for item in value)
    if type(value) is dict:
        return (
            bool(value)
            and parts.issuperset(value)
            and all(type(v) in (bool, float, str) for v in value.values())
        )
    return type(value) in (str, bool, float)


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's attributes, with those of its classes that are not torch's; no property is run."""
    of_class = dict[str, Any]()
    for base in reversed(type(module).__mro__):
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            of_class |= vars(base)
    for name, value in {**of_class, **vars(module)}.items():
        if name[:2] != "__" and name not in INTERNALS and not hasattr(type(of_class.get(name)), "__set__"):
            yield name, value
