"""Tensors without data: make models of them, and tell them from real ones.

Private API of torch (``torch._subclasses.FakeTensorMode``); tried with 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch


def without_data() -> AbstractContextManager[Any]:
    """A block in which every new tensor has a shape, a dtype and a device, and no data."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def has_fakes(values: Iterable[Any]) -> bool:
    """Whether any value is a tensor without data."""
    return any(isinstance(v, torch.Tensor) and (hasattr(v, "fake_mode") or v.is_meta) for v in values)
