"""Calls of torch functions that were watched once, and run unwatched from then on.

A capture makes torch run thousands of lines of Python for each op, none of them the model's, and a profile
function is told of each. Whether somebody else's code is among them, such as a kernel registered for one of
torch's ops, or a function of torch that was replaced, shows in the first such call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import (
    BuiltinFunctionType,
    EllipsisType,
    FunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    NoneType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from stitchcache.keys.origins import module_stands_by_version
from stitchcache.torchside.ops import OpOverload
from stitchcache.torchside.state import dispatch_modes

# To hash one of these, or to look at a value of these kinds, runs nobody's code.
_FUNCTIONS = frozenset(
    {
        BuiltinFunctionType,
        FunctionType,
        MethodDescriptorType,
        MethodWrapperType,
        WrapperDescriptorType,
        OpOverload,
    }
)
_NAMESPACES = frozenset({"aten", "prims"})
_PLAIN = frozenset(
    {
        bool,
        int,
        float,
        complex,
        str,
        slice,
        NoneType,
        EllipsisType,
        torch.Size,
        torch.SymInt,
        torch.SymFloat,
        torch.SymBool,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
    }
)
_CONTAINERS = (tuple, list)
_CHOICES = (bool, str)
"""Values of these choose between ways through torch's code; numbers are sizes."""


class FamiliarCalls(TorchFunctionMode):
    """Takes the profile function away while torch does what it was seen doing.

    A call is familiar when an earlier one of the same function, with arguments of the same kinds (texts and
    truth values: the same) on the same kinds of devices and under the same kinds of dispatch modes, was
    watched and nothing was noticed below it.
    Calls that are given anything but tensors of torch's own classes and plain values, a function for
    instance, never are, nor is any under a mode of the user's.

    Args:
        profile: The profile function.
        noticed: How much it has noticed so far, in any unit that grows.
    """

    def __init__(self, profile: Callable[..., Any], noticed: Callable[[], int]) -> None:
        super().__init__()
        self._profile = profile
        self._noticed = noticed
        self._familiar: set[tuple[Any, ...]] = set()
        self._own: dict[type, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call, watched or not."""
        given = kwargs or {}
        # Dynamo would trace what follows; another profile function is not ours to take away.
        if torch.compiler.is_dynamo_compiling() or sys.getprofile() is not self._profile:
            return func(*args, **given)
        sys.setprofile(None)
        try:
            call = self._kind_of_call(func, args, given)
            if call in self._familiar:
                return func(*args, **given)
        finally:
            sys.setprofile(self._profile)
        before = self._noticed()
        result = func(*args, **given)
        if call is not None and self._noticed() == before:
            self._familiar.add(call)
        return result

    def _kind_of_call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        if type(func) not in _FUNCTIONS:
            return None
        # What a user's op does may be known from an earlier capture, and run only for another size.
        if isinstance(func, OpOverload) and func.namespace not in _NAMESPACES:
            return None
        modes = [type(mode) for mode in dispatch_modes()]
        if not all(self._is_torchs(mode) for mode in modes):
            return None
        kinds: list[Any] = [func, *modes, *kwargs]
        if all(self._add_kind(kinds, value) for value in (*args, *kwargs.values())):
            return tuple(kinds)
        return None

    def _add_kind(self, kinds: list[Any], value: Any) -> bool:
        """Add what kind of argument a value is; ``False`` if that cannot be told without running code."""
        kind = type(value)
        kinds.append(kind)
        if kind in _PLAIN:
            if kind in _CHOICES:
                kinds.append(value)
            return True
        if kind in _CONTAINERS:
            kinds.append(len(value))
            return all(self._add_kind(kinds, item) for item in value)
        own = issubclass(kind, torch.Tensor) and self._is_torchs(kind)
        if own:
            kinds.append(value.device.type)
        return own

    def _is_torchs(self, cls: type) -> bool:
        known = self._own.get(cls)
        if known is None:
            known = self._own[cls] = module_stands_by_version(cls.__module__)
        return known
