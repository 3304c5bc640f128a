"""Calls of models that choose among parts held by name, as LoRA layers do among adapters.

A trace has the part that was chosen then, and goes on with it. So a call looks whether the model still
chooses it, at the first and the last such module of each class: a model may have hundreds, which are switched
together.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from operator import itemgetter
from typing import Any

import torch

from stitchcache.errors import InputMismatchError
from stitchcache.state import HOLDERS, modules_of
from stitchcache.torchside import INTERNALS

_NAMES = (str, list, tuple, set)
# Not every truth value: each one that is looked at takes a part of each call.
_SWITCHES = ("active", "adapter", "disable", "enable", "merge")


class _Choice:
    """What one module's plain attributes say of its parts, and what they said when it was bound."""

    __slots__ = ("known", "names", "own", "path", "read")

    def __init__(self, path: str, module: torch.nn.Module, names: list[str]) -> None:
        self.path, self.own, self.names = path, vars(module), names
        self.read = itemgetter(*names)
        self.known = deepcopy(self.read(self.own))

    def look_again(self) -> None:
        """Raise if another part is chosen; take over what was added, and is not chosen."""
        known = self.known if len(self.names) > 1 else (self.known,)
        for name, was in zip(self.names, known, strict=True):
            found = self.own.get(name)
            kept = {key: found.get(key) for key in was} if type(was) is type(found) is dict else found
            if kept != was:
                raise InputMismatchError(
                    f"{self.path}{name} was {was!r} when the model was compiled, and is {found!r} now. "
                    "Compile the model for it, or switch it back.",
                    argument=f"{self.path}{name}",
                    expected=repr(was),
                    actual=repr(found),
                )
        self.known = deepcopy(self.read(self.own))


def over_choices(function: Callable[..., Any], model: torch.nn.Module) -> Callable[..., Any]:
    """A function that raises ``InputMismatchError`` where a model chooses other parts than it does now."""
    choices: dict[tuple[type, bool], _Choice] = {}
    for path, module in modules_of(model):
        if names := _choosing(module):
            choices[type(module), (type(module), False) in choices] = _Choice(path, module, names)
    watched = tuple((choice, choice.read, choice.own) for choice in choices.values())

    def checked(*args: Any) -> Any:
        for choice, read, own in watched:
            if read(own) != choice.known:
                choice.look_again()
        return function(*args)

    return checked if watched else function


def _choosing(module: torch.nn.Module) -> list[str]:
    """Attributes of a module that choose among parts that it holds; none where no attribute names a part."""
    parts = {key for child in module._modules.values() if isinstance(child, HOLDERS) for key in child}
    own = {name: value for name, value in vars(module).items() if name not in INTERNALS} if parts else {}
    if not any(value and _names_parts(value, parts) for value in own.values() if type(value) in _NAMES):
        return []
    return [name for name, value in own.items() if _names_parts(value, parts) or _sets(name, value, parts)]


def _names_parts(value: Any, parts: set[str]) -> bool:
    """Whether a value is the name of a part, or names of some, or of none yet."""
    some = (value,) if type(value) not in _NAMES or type(value) is str else value
    return all(type(item) is str and item in parts for item in some)


def _sets(name: str, value: Any, parts: set[str]) -> bool:
    """Whether an attribute is a switch, by its name, or a factor, or has one for each part."""
    if type(value) is dict:
        return bool(value) and parts.issuperset(value) and {*map(type, value.values())} == {float}
    return type(value) is float or (type(value) is bool and any(word in name for word in _SWITCHES))
