"""The demo's model: a decoder whose attention is an op of its own that writes in place.

That is how serving engines write attention: the op gets the tensor to fill and the name of its layer, and
compiled code stops in front of it and goes on behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from stitchcache.api.prewarm import Target

ATTENTION = "stitchdemo::attention"
MOST_ROWS = 64
MOST_TOKENS = 256


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer: str) -> None:
    out.copy_(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


# torch.library.custom_op would be shorter, but its ops import torch._dynamo when they are first called. The
# library lives as long as this object.
_library: Any = torch.library.Library("stitchdemo", "DEF")  # type: ignore[no-untyped-call]
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, str layer) -> ()")
_library.impl("attention", _attend, "CPU")
_library.impl("attention", _attend, "CUDA")
# It returns nothing, so its fake has nothing to work out.
_library.impl("attention", lambda *_: None, "Meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder; ``width`` is that of a token's vector, and a multiple of ``heads``."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    vocabulary: int = 128


class Block(nn.Module):
    """One pre-norm block; its index names its attention."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.name = f"layers.{index}"
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on ``[rows, tokens, width]``."""
        rows, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.empty_like(q)
        torch.ops.stitchdemo.attention(q, k, v, out, self.name)
        x = x + self.merge(out.transpose(1, 2).reshape(rows, tokens, width))
        added: Tensor = self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))
        return x + added


class Decoder(nn.Module):
    """Token ids to logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[rows, tokens, vocabulary]`` of ids ``[rows, tokens]``."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def build(config: DecoderConfig) -> tuple[Decoder, tuple[Tensor]]:
    """A decoder with weights that are the same in every process, and example ids."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(config).eval()
    return model, (token_ids(config, 2, 16),)


def token_ids(config: DecoderConfig, rows: int, tokens: int) -> Tensor:
    """Ids ``[rows, tokens]`` that are the same in every process."""
    generator = torch.Generator().manual_seed(rows * 1000 + tokens)
    return torch.randint(config.vocabulary, (rows, tokens), generator=generator)


def decoder_target(config: DecoderConfig, backend: str = "aoti") -> Target:
    """The decoder as a prewarm target, rows and tokens dynamic."""
    # Not at the top: eager runs of the demo import nothing of stitchcache but this file.
    from stitchcache.api.prewarm import Target
    from stitchcache.options import Dim

    dims = {0: Dim("rows", min=1, max=MOST_ROWS), 1: Dim("tokens", min=2, max=MOST_TOKENS)}
    return Target(
        f"demo decoder, {config.layers} layers",
        lambda: build(config),
        dynamic_shapes={"ids": dims},
        splitting_ops=(ATTENTION,),
        backend=backend,
    )


def target() -> Target:
    """The decoder that ``stitchcache demo`` takes by default."""
    return decoder_target(DecoderConfig())
