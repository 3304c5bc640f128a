"""Threads of a piece's loops: settled when it runs where there is enough to share, one otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stitchcache.backends.threads import ENOUGH, thread_options
from stitchcache.capture import capture


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 512)

    def forward(self, x):
        return self.linear(x).relu()


def piece(rows):
    return capture(Wide().eval(), (torch.randn(rows, 512),), {}).gm


@pytest.mark.parametrize(("rows", "shared"), [(2, False), (ENOUGH // 512 - 1, False), (ENOUGH // 512, True)])
def test_enough_work_is_shared(rows, shared):
    found = thread_options(piece(rows), {})
    assert found.get("cpp.dynamic_threads", False) is shared
    assert (found["cpp.threads"] == 1) is not shared


def test_a_size_that_varies_counts_as_in_the_example():
    rows = torch.export.Dim("rows", min=2, max=4096)
    for size, shared in ((4, False), (256, True)):
        gm = capture(Wide().eval(), (torch.randn(size, 512),), {}, ({0: rows},)).gm
        assert thread_options(gm, {}).get("cpp.dynamic_threads", False) is shared


@pytest.mark.parametrize("option", [{"cpp.threads": 4}, {"cpp.dynamic_threads": False}])
def test_what_the_user_says_is_left_alone(option):
    assert thread_options(piece(256), option) == {}
