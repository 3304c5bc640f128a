"""File-system calls that fail, kill the process, or are written down."""

from __future__ import annotations

import os
import signal
from typing import Any

from stitchcache.store import Calls, Files

CALLS = [name for name in vars(Calls) if not name.startswith("_")]


class Intercepted(Files):
    """Every call goes through :meth:`before`, which may raise."""

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        raise NotImplementedError


def _intercept(name: str):
    def call(self, *args, **kwargs):
        real = getattr(super(Intercepted, self), name)
        try:
            self.before(name, args)
        except OSError:
            # A failed close has closed, as on Linux.
            if name == "close":
                real(*args, **kwargs)
            raise
        return real(*args, **kwargs)

    return call


for _name in CALLS:
    setattr(Intercepted, _name, _intercept(_name))


class Counting(Intercepted):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        self.calls.append(name)


class Failing(Intercepted):
    """The call of a number fails with an errno, once, or it and all after it."""

    def __init__(self, at: int, errno: int, *, persistent: bool) -> None:
        self.at, self.errno, self.persistent, self.seen = at, errno, persistent, 0

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        self.seen += 1
        if self.seen - 1 == self.at or (self.persistent and self.seen - 1 > self.at):
            path = args[0] if args and isinstance(args[0], str) else None
            raise OSError(self.errno, os.strerror(self.errno), path)


class Killing(Intercepted):
    """The process dies before the call of a number; a write gets half of its bytes out."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        self.seen += 1
        if self.seen - 1 == self.at:
            if name == "write":
                os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
