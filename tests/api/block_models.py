"""A transformer of equal blocks, and adapters that are put in, swapped and taken out as peft does it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """A linear layer beside which an adapter runs."""

    def __init__(self, base: nn.Linear, rank: int, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=made))
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=made))
        self.scaling = {"default": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.T @ self.up.T) * self.scaling["default"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        hidden = torch.relu(self.inner(self.norm(x) + shift)) if shift is not None else self.inner(x)
        return x + self.outer(hidden)


class Transformer(nn.Module):
    def __init__(self, layers: int = 4, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift=shift)
        return self.head(x)


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer().eval()


def adapt(made: Transformer, rank: int, seed: int) -> None:
    """Put new adapters in, or swap the present ones."""
    for place, block in enumerate(made.blocks):
        base = block.inner.base if isinstance(block.inner, Adapted) else block.inner
        block.inner = Adapted(base, rank, seed + place).eval()


def release(made: Transformer) -> None:
    for block in made.blocks:
        block.inner = block.inner.base
