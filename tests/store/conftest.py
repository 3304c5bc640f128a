from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def full() -> bool:
    """Whether the full counts are asked for."""
    return os.environ.get("STITCHCACHE_FULL") == "1"
