"""Models for the GPU, shared by tests and by ``tests/benchmarks/bench_gpu.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stitchcache import Dim

_library = torch.library.Library("stitchgpu", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions, "
    "Tensor(c!) out, str layer) -> ()"
)


def _attention(q, k, v, keys, values, positions, out, layer):
    keys.index_copy_(1, positions, k)
    values.index_copy_(1, positions, v)
    mask = torch.arange(keys.shape[1], device=q.device)[None] <= positions[:, None]
    out.copy_(
        nn.functional.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=mask)[0]
    )


_library.impl("attention", _attention, "CUDA")
_library.impl("attention", _attention, "CPU")
_library.impl("attention", lambda *_: None, "Meta")

ATTENTION = "stitchgpu::attention"
MOST_TOKENS = 256


class Block(nn.Module):
    """A layer of a decoder with a static cache, which its attention writes in place."""

    def __init__(self, width: int, heads: int, index: int) -> None:
        super().__init__()
        self.heads, self.name = heads, f"layers.{index}"
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        shape = (heads, MOST_TOKENS, width // heads)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(tokens, 3, self.heads, width // self.heads)
        q, k, v = (part.contiguous() for part in qkv.permute(1, 2, 0, 3).unbind(0))
        out = torch.empty_like(q)
        torch.ops.stitchgpu.attention(q, k, v, self.keys, self.values, positions, out, self.name)
        x = x + self.merge(out.transpose(0, 1).reshape(tokens, width))
        y = self.mlp_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Token ids and positions to logits."""

    def __init__(self, layers: int, width: int, vocabulary: int = 32000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, max(4, width // 128), index) for index in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(self.norm(x))


def decoder(layers: int, width: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A decoder with weights that are the same in every process on one kind of device."""
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return Decoder(layers, width).eval()
        finally:
            torch.set_default_dtype(before)


def call(tokens: int, device: str = "cuda", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and positions of a call."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    ids = torch.randint(32000, (tokens,), generator=generator)
    return ids.to(device), torch.arange(tokens, device=device)


def options() -> dict[str, object]:
    """How a decoder is compiled."""
    tokens = {0: Dim("tokens", min=2, max=MOST_TOKENS)}
    return {"dynamic_shapes": (tokens, tokens), "splitting_ops": [ATTENTION]}
