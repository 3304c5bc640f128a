"""Small models of many forms; their mutants must never be served what they were before."""

import dataclasses
import enum
import math

import torch
import torch.nn.functional as F
from torch import nn

SCALES = {"low": 0.5, "high": 2.0}
LAYERS = (("wide", 8), ("narrow", 4))
EPS = 1e-3


class Mode(enum.Enum):
    ADD = "add"
    GATE = "gate"


@dataclasses.dataclass(frozen=True)
class Options:
    width: int = 4
    heads: int = 2
    mode: Mode = Mode.GATE
    scale: float = SCALES["high"]
    causal: bool = True


def scaled(by):
    def apply(x):
        return x * by + EPS

    return apply


def rotate(x, base=100.0):
    half = x.shape[-1] // 2
    turns = torch.arange(half, dtype=x.dtype) / half
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * base**-turns
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def slope(heads):
    return [2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)]


class Norm(nn.Module):
    def __init__(self, width, eps=EPS):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.eps = eps

    def forward(self, x):
        mean = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean + self.eps)


class Attention(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options
        self.qkv = nn.Linear(options.width, 3 * options.width, bias=False)
        self.out = nn.Linear(options.width, options.width)

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        heads = self.options.heads
        q, k, v = (
            part.view(batch, length, heads, width // heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(width // heads)
        if self.options.causal:
            blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(blocked, float("-inf"))
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores + torch.tensor(slope(heads))[:, None, None] * 0.1, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Gate(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.mode = options.mode
        self.up = nn.Linear(options.width, 2 * options.width)
        self.down = nn.Linear(options.width, options.width)

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)
        if self.mode is Mode.GATE:
            mixed = F.silu(a) * b
        elif self.mode is Mode.ADD:
            mixed = a + b
        else:
            raise ValueError(self.mode)
        return self.down(F.gelu(mixed, approximate="tanh"))


class Zoo(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.norms = nn.ModuleList(Norm(options.width) for _ in range(2))
        self.attention = Attention(options)
        self.gate = Gate(options)
        self.conv = nn.Conv1d(options.width, options.width, 3, padding=1, groups=2)
        self.finish = scaled(options.scale)
        self.register_buffer("offset", torch.arange(options.width) * 0.1)
        self.sizes = {name: size for name, size in LAYERS if size > 4}

    def forward(self, x, *, mask=None, flip=False):
        x = x + self.attention(self.norms[0](x), mask=mask)
        x = x + self.gate(self.norms[1](x))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        for name, size in self.sizes.items():
            x = x * (1 + len(name) / size)
        if flip and not self.training:
            x = x.flip(-1)
        return {"out": self.finish(x) - self.offset, "top": x.amax(dim=-1), "rank": x.sum(-1).argsort(dim=-1)}


def build():
    torch.manual_seed(0)
    return Zoo(Options()).eval(), (torch.randn(2, 3, 4),), {"mask": torch.zeros(3, 3), "flip": True}
