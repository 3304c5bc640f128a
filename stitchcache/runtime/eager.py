"""Calls that the model itself serves: before it is compiled, and outside of what was captured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from traceback import walk_tb
from typing import Any

import torch

from stitchcache.errors import InputMismatchError
from stitchcache.runtime import run_quietly


def as_it_is(model: torch.nn.Module, device: str) -> Callable[..., Any]:
    """A model's call, without autograd and autocast as compiled pieces run, whatever the caller's modes."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        return run_quietly(partial(model, **kwargs), device, args)

    return serve


def or_as_it_is(
    call: Callable[..., Any],
    model: torch.nn.Module,
    device: str,
    noted: Callable[[InputMismatchError], None],
) -> Callable[..., Any]:
    """A compiled call that leaves to the model what does not fit the contract; ``noted`` gets each mismatch.

    ``call`` raises ``InputMismatchError`` before anything runs, where arguments do not fit.
    """
    eagerly, own = as_it_is(model, device), getattr(call, "__code__", None)

    def serve(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except InputMismatchError as error:
            codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
            if any(code.co_filename.startswith("<stitchcache ") and code is not own for code in codes):
                # Raised by a compiled model that a splitting op calls. Pieces have run before it and may have
                # written, so the model must not run a second time.
                raise
            noted(error)
        return eagerly(*args, **kwargs)

    return serve
