"""Ask torch's dispatcher about autocast. Private API; tried with torch 2.11 and 2.13."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def autocast_has_rule(op: OpOverload, device: str) -> bool:
    """Whether autocast knows an op by itself, rather than the ops that it is made of.

    Args:
        op: An op.
        device: A device type.
    """
    key = _KEYS.get(device)
    name = f"{op._schema.name}.{op._schema.overload_name}".rstrip(".")
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
