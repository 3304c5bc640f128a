"""torch's C++ runner of AOTInductor's libraries. Imports neither ``torch._inductor`` nor ``torch._dynamo``.

Uses ``torch._C._aoti.AOTIModelContainerRunnerCpu`` and ``AOTIModelContainerRunnerCuda``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

SEEN = ("2.11", "2.13")


def load_library(path: str, device: str) -> Callable[[list[Any]], Sequence[Any]]:
    """Map a library and make one instance of its model.

    Args:
        path: The library.
        device: Where it runs: ``cpu``, or ``cuda:1``.

    Returns:
        Its ``run``: one list of tensors to one list of tensors.

    Raises:
        RuntimeError: It cannot be mapped, or was made for another torch.
    """
    if device.startswith("cuda"):
        runner: Any = torch._C._aoti.AOTIModelContainerRunnerCuda(path, 1, device)
    else:
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1)
    run: Callable[[list[Any]], Sequence[Any]] = runner.run
    return run
