from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _umask():
    """Directories that tests make are the user's alone, whatever the umask that the tests run under."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def full() -> bool:
    """Whether the full counts are asked for."""
    return os.environ.get("STITCHCACHE_FULL") == "1"
