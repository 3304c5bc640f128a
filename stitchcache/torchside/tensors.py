"""What tensors do not tell in public: whose memory they use, and whether they have data.

Uses ``UntypedStorage._cdata``, ``Tensor._version``, ``torch._neg_view``, ``FakeTensor.fake_mode``,
``torch._subclasses.FakeTensorMode``, ``torch.utils._python_dispatch.is_traceable_wrapper_subclass`` and
``torch._C._functorch.is_functorch_wrapped_tensor``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SEEN = ("2.11", "2.13")

FAKE_INTERNALS = frozenset(
    {
        "fake_mode",
        "fake_device",
        "_fake_device",
        "constant",
        "pytype",
        "dispatch_keys",
        "real_tensor",
        "_is_param",
    }
)
"""What a fake tensor keeps about itself in its ``__dict__``, beside its memos."""


def storage_id(value: torch.Tensor) -> int:
    """Identity of a tensor's memory. Views share it, also views of tensors without data."""
    return int(value.untyped_storage()._cdata)


def version_of(value: torch.Tensor) -> int:
    """A number that grows with each write into a tensor or a view of it."""
    return int(value._version)


def negated(value: torch.Tensor) -> torch.Tensor:
    """A view that negates lazily, by a bit of its own."""
    return torch._neg_view(value)


def without_data() -> AbstractContextManager[Any]:
    """A block in which every new tensor has a shape, a dtype and a device, and no data."""
    # Not at the top: most processes never make a tensor without data.
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor: one with sizes, strides and a device, and no data."""
    return isinstance(value, torch.Tensor) and hasattr(value, "fake_mode")


def has_fakes(values: Iterable[Any]) -> bool:
    """Whether any value is a tensor without data."""
    return any(isinstance(v, torch.Tensor) and (hasattr(v, "fake_mode") or v.is_meta) for v in values)


def fake_mode_of(values: Iterable[Any]) -> Any | None:
    """The mode that the first fake tensor among the values was made in; ``None`` without one."""
    return next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)


def is_wrapper(value: Any) -> bool:
    """Whether a value is a tensor that is made of others, such as a ``DTensor``."""
    return bool(is_traceable_wrapper_subclass(value))


def is_transformed(value: Any) -> bool:
    """Whether a value lives inside a transform of ``torch.func``, such as ``vmap``."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
