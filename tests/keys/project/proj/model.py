import functools

import torch
from torch import nn
from torch.nn import functional as F

from proj import (
    lazy as _lazy,  # noqa: F401 - so that it is loaded before the model runs
    ops,
)
from proj.settings import Mode, Settings


def relu_like(x):
    return torch.relu(x)


class Block(nn.Module):
    EPS = 1e-3

    def __init__(self, settings, index):
        super().__init__()
        self.settings = settings
        self.index = index
        self.linear = nn.Linear(settings.width, settings.width)
        self.norm = nn.LayerNorm(settings.width)
        self.register_buffer("seen", torch.ones(settings.width))
        self.act = relu_like
        self.power = functools.partial(torch.pow, exponent=2)
        self.pure = ops.Pure(1.5)
        self.enabled = True
        self.table = torch.arange(settings.width, dtype=torch.float32)
        self.names = {"q", "k"}

    def forward(self, x):
        y = self.act(self.linear(x)) + self.EPS
        if self.enabled:
            y = y + self.power(x)
        if self.settings.mode is Mode.ADD:
            y = y + self.settings.scale
        elif self.settings.mode is Mode.MUL:
            y = y * self.settings.scale
        if "q" in self.names:
            y = y - len(self.names)
        y = self.pure.apply(y) * self.seen + self.table
        return self.norm(y) + self.settings.extras["shift"]


class Net(nn.Module):
    def __init__(self, settings=None):
        super().__init__()
        settings = settings or Settings()
        self.settings = settings
        self.blocks = nn.ModuleList([Block(settings, i) for i in range(2)])
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = ops.gate(ops.fold(ops.shift(x))) * ops.slope(3)
        x = ops.from_environment(ops.late(x))
        return self.drop(F.gelu(x))


def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.ones(4, 8),)
