"""What a pair of models is: two that a key could take for one, and whose results differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

X = torch.arange(1.0, 9.0).reshape(2, 4)


@dataclass(frozen=True)
class Built:
    """A model with its example, and options of ``stitchcache.compile``."""

    model: nn.Module
    args: tuple[Any, ...] = (X,)
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


Build = Callable[[bool, Any], Built]
PAIRS: dict[str, Build] = {}
"""Name to a function that builds the first model or the second; what it patches is undone after the pair."""


def pair(build: Build) -> Build:
    """Register a pair under its function's name."""
    name = f"{build.__module__.removeprefix('pairs_')}: {build.__name__.replace('_', ' ')}"
    if name in PAIRS:
        raise ValueError(f"two pairs are called {name!r}")
    PAIRS[name] = build
    return build


class Held(nn.Module):
    """Multiplies by what a function reads out of a held value."""

    def __init__(self, value: Any, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.value = value
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read(self.value)


class Two(nn.Module):
    """The same with two values."""

    def __init__(self, one: Any, other: Any, read: Callable[[Any, Any], float]) -> None:
        super().__init__()
        self.one = one
        self.other = other
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read(self.one, self.other)


class Calls(nn.Module):
    """Applies a function to its argument."""

    def __init__(self, function: Callable[..., Any], *parts: Any) -> None:
        super().__init__()
        self.function = function
        self.parts = parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def values(prefix: str, table: list[tuple[str, Any, Any, Callable[[Any], float]]]) -> None:
    """Register pairs of :class:`Held`: name, the first value, the second, and what reads them.

    A value may be a function without arguments that makes it, so that both models are built anew.
    """
    for name, first, second, read in table:

        def build(
            other: bool, patch: Any, first: Any = first, second: Any = second, read: Any = read
        ) -> Built:
            value = second if other else first
            made = isinstance(value, Make)
            return Built(Held(value.make() if made else value, read))

        build.__module__, build.__name__ = f"pairs_{prefix}", name
        pair(build)


@dataclass(frozen=True)
class Make:
    """A value that is made for each model."""

    make: Callable[[], Any]
