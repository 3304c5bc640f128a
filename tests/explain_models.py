"""Models for tests of explanations; not in a test file, whose code pytest rewrites."""

import decimal
import functools

import torch


class Scaled(torch.nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


class Twice(torch.nn.Module):
    def forward(self, x):
        return x * 2


@functools.lru_cache
def cached_three():
    return 3.0


class Cached(torch.nn.Module):
    def forward(self, x):
        return x * cached_three()


class Third(torch.nn.Module):
    """Depends on decimal's precision, which C code keeps for the thread."""

    def forward(self, x):
        return x * float(decimal.Decimal(1) / decimal.Decimal(3))
