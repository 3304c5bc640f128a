"""Models whose forward keeps something: tensors made while it is traced, numbers, lists."""

import torch
from torch import nn

KEPT: dict[str, torch.Tensor] = {}


class Bag:
    """A plain object."""


class Registers(nn.Module):
    """Makes its buffer in the first call."""

    def forward(self, x):
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.ones(4) * 2, persistent=False)
        return x * self.table


class FillsNone(nn.Module):
    """The same with a buffer that is None."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", None)

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(4) * 3
        return x * self.table


class FillsObject(nn.Module):
    """Keeps a constant in a plain object."""

    def __init__(self):
        super().__init__()
        self.bag = Bag()
        self.bag.table = None

    def forward(self, x):
        if self.bag.table is None:
            self.bag.table = torch.ones(4) * 3
        return x * self.bag.table


class Rebinds(nn.Module):
    """Puts another tensor where the one was that it reads."""

    def __init__(self, where):
        super().__init__()
        self.own = torch.zeros(2, 4)
        self.listed = [torch.zeros(2, 4)]
        self.bag = Bag()
        self.bag.table = {"k": torch.zeros(2, 4)}
        self.where = where

    def forward(self, x):
        if self.where == "own":
            self.own = self.own + x
            return self.own * 1
        if self.where == "listed":
            self.listed[0] = self.listed[0] + x
            return self.listed[0] * 1
        self.bag.table["k"] = self.bag.table["k"] + x
        return self.bag.table["k"] * 1


class Counts(nn.Module):
    """Reads a number that it counts up, or only counts."""

    def __init__(self, where, read):
        super().__init__()
        self.number = 1
        self.bag = Bag()
        self.bag.number = 1
        self.seen = []
        self.where = where
        self.read = read

    def forward(self, x):
        holder = self if self.where == "own" else self.bag
        holder.number += 1
        self.seen.append(holder.number)
        return x * holder.number if self.read else x * 2


class Grows(nn.Module):
    """Sums all that it was ever given."""

    def __init__(self):
        super().__init__()
        self.bag = Bag()
        self.bag.given = []

    def forward(self, x):
        self.bag.given.append(x)
        return sum(self.bag.given)


class KeepsOutside(nn.Module):
    """Keeps a tensor in a global."""

    def forward(self, x):
        if "table" not in KEPT:
            KEPT["table"] = torch.ones(4) * 3
        return x * KEPT["table"]


class Stashes(nn.Module):
    """Leaves its last result for somebody to read."""

    def __init__(self):
        super().__init__()
        self.last = torch.zeros(2, 4)

    def forward(self, x):
        self.last = x * 2
        return self.last + 1


class Draws(nn.Module):
    def forward(self, x):
        return x * torch.rand_like(x)


class Odd(Exception):
    """An error of the user's own."""


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        if self.what == "error":
            raise Odd("no")
        return x * 1, x.shape if self.what == "shape" else float("nan")


class CountsBeside(nn.Module):
    """Counts in a plain number, and writes or draws something else that every call changes."""

    def __init__(self, beside, read):
        super().__init__()
        self.beside, self.read, self.number = beside, read, 0
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, x):
        self.number += 1
        if self.beside == "full" and not torch.compiler.is_compiling() and self.total > 0:
            raise IndexError("the cache is full")
        if self.beside in ("buffer", "full"):
            self.total.add_(1)
        if self.beside == "argument":
            x.add_(1)
        y = x + torch.rand(4) if self.beside == "random" else x + self.total
        return y * self.number if self.read else y * 2
