"""Small models that tests share; importable in fresh processes too."""

from __future__ import annotations

import torch
from torch import nn

_library = torch.library.Library("stitchtest", "DEF")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, str layer) -> ()")
_library.define("scale(Tensor x, float factor) -> Tensor")


def _attention(q, k, v, out, layer):
    out.copy_(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


_library.impl("attention", _attention, "CPU")
_library.impl("attention", lambda q, k, v, out, layer: None, "Meta")
_library.impl("scale", lambda x, factor: x * factor, "CompositeExplicitAutograd")

ATTENTION = "stitchtest::attention"


class Block(nn.Module):
    """One decoder layer that calls an in-place attention op by its layer's name."""

    def __init__(self, width: int, heads: int, index: int) -> None:
        super().__init__()
        self.heads = heads
        self.name = f"layers.{index}"
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.empty_like(q)
        torch.ops.stitchtest.attention(q, k, v, mixed, self.name)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """A decoder small enough to compile in a test."""

    def __init__(self, layers: int = 2, width: int = 16, heads: int = 2, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, heads, i) for i in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def decoder(layers: int = 2, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(layers).eval()


def ids(batch: int = 2, length: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(0, 32, (batch, length), generator=generator)


def decoder_options(**more):
    from stitchcache import Dim

    shapes = ({0: Dim("batch", 1, 16), 1: Dim("length", 2, 64)},)
    return {"dynamic_shapes": shapes, "splitting_ops": [ATTENTION], "backend": "eager", **more}


class Pair(nn.Module):
    """Takes a dict and a keyword, returns nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, batch, *, factor=2, mask=None):
        y = self.linear(x) * factor + batch["bias"]
        if mask is not None:
            y = y * mask
        return {"y": y, "rest": [batch["bias"] + 1, (x, None, 7)]}


class Counter(nn.Module):
    """Writes to its buffers in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.calls.add_(1)
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return x - self.mean


class Tied(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


class Branch(nn.Module):
    """Branches on a value: cannot be exported."""

    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x
