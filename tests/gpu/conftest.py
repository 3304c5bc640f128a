"""Tests that need a GPU; without one they skip."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="needs an NVIDIA GPU; docs/benchmarks.md says where it was run")
    for item in items:
        if "gpu" in item.path.parts and item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(missing)
