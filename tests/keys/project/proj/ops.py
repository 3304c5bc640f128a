import functools
import os

import torch

from proj import settings

OFFSET = 1.0
_memo = {}


def shift(x, by=OFFSET):
    return x + by * settings.FACTOR


def fold(x):
    # A comment that tests edit: blue.
    return x * settings.TABLE["a"] - settings.SHARED.scale


@functools.cache
def slope(n):
    return n * 0.25


def from_environment(x):
    return x * 2 if os.environ.get("PROJ_DOUBLE") == "1" else x


def make_gate(limit):
    def gate(x):
        return torch.clamp(x, max=limit)

    return gate


gate = make_gate(4.0)


class Pure:
    rate = 0.1

    def __init__(self, bias):
        self.bias = bias

    def apply(self, x):
        return x + self.bias * self.rate


def late(x):
    from proj import lazy

    return lazy.tail(x)
