"""A small Llama from a config, with random weights: greedy generation, batch and length dynamic.

    pip install 'transformers>=4.57'
    stitchcache prewarm docs/examples/llama.py:target
    python docs/examples/llama.py

The second command compiles; the third, and every later one, starts from what it left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import stitchcache

VOCABULARY = 256
MOST_ROWS = 64
MOST_TOKENS = 256


def load_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MOST_TOKENS,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def prompt(rows: int, tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def build() -> tuple[LlamaForCausalLM, tuple[()], dict[str, Tensor]]:
    return load_model(), (), {"input_ids": prompt(2, 16)}


batch = stitchcache.Dim("batch", min=1, max=MOST_ROWS)
length = stitchcache.Dim("tokens", min=2, max=MOST_TOKENS)
target = stitchcache.Target(
    "llama",
    build,
    dynamic_shapes={"input_ids": {0: batch, 1: length}},
    splitting_ops=["aten::scaled_dot_product_attention"],
)


def compile_model(
    cache: stitchcache.Cache | None = None,
) -> tuple[stitchcache.CompiledModel, LlamaForCausalLM]:
    """The compiled model, and the one it took its weights from."""
    model, args, kwargs = build()
    compiled = stitchcache.compile(
        model,
        args,
        kwargs,
        dynamic_shapes=target.dynamic_shapes,
        splitting_ops=target.splitting_ops,
        cache=cache,
    )
    return compiled, model


@torch.no_grad()
def generate(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """The prompt with the likeliest tokens after it; without a key-value cache, to keep it short."""
    for _ in range(tokens):
        logits = model(input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def main() -> None:
    compiled, model = compile_model()
    print(f"{compiled!r} in {compiled.timings['total'] * 1e3:.0f} ms")
    for rows, tokens in ((1, 4), (3, 11)):
        ids = prompt(rows, tokens)
        with torch.no_grad():
            difference = (compiled(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()
        print(f"{rows} rows of {tokens} tokens: largest difference from eager {difference:.1e}")
        generated = generate(compiled, ids, 8)
        print(f"  same tokens as eager: {torch.equal(generated, generate(model, ids, 8))}")
        for row in generated.tolist():
            print("  ", *row[:tokens], "->", *row[tokens:])


if __name__ == "__main__":
    main()
