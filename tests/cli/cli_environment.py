"""The environment in which the command is run."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[2]


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(PACKAGE), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, **extra}
