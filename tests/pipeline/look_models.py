"""Models for the tests of the look, in a file that is no test: pytest rewrites those."""

import os
import threading

import torch
from torch import nn


class Scales(nn.Module):
    """Multiplies by a number from where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.linear(x) * float(os.environ.get("LOOKTEST_FACTOR", "2")), "x": x + 1}


class Caches(nn.Module):
    """A decoder's cache in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, 4))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        self.cache.index_copy_(0, self.position, x)
        self.position.add_(1)
        return self.cache.sum(0)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.linear(x) * 3, "x": x + 1}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.linear(x) * 2, "x": x + 1}


class Misplaces(Caches):
    """The sum is the same; only the buffer tells."""

    def forward(self, x):
        self.cache.index_copy_(0, self.position + 1, x)
        self.position.add_(1)
        return self.cache.sum(0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return y if torch.compiler.is_compiling() else y * 2


class Asks(nn.Module):
    """Does something else while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"hidden": x}


class Fails(nn.Module):
    def forward(self, x):
        if not torch.compiler.is_compiling():
            raise ValueError("only when it is traced")
        return x + 1


class Turns(nn.Module):
    def forward(self, x):
        x.t_()
        return x * 2


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand(3)


class Slow(Plain):
    """Waits in the thread of the look."""

    def forward(self, x):
        result = super().forward(x)
        if threading.current_thread().name == "stitchcache look":
            REACHED.set()
            GATE.wait(20)
        return result


GATE, REACHED = threading.Event(), threading.Event()
