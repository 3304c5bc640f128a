"""Switching autograd off around a call, without the objects that ``torch.no_grad`` makes.

Private API of torch (``torch._C._set_grad_enabled``, which ``torch.no_grad`` calls itself); tried with
2.11 and 2.13. The context manager takes seven times as long, on every call of a compiled model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Set this thread's grad mode."""
