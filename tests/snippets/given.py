"""What pages take as given: names that their snippets use, and words in them that mean something here.

A function is called as its page is, and returns both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stitchcache
from stitchcache import Dim

Given = tuple[dict[str, Any], dict[str, str]]
SDPA = "aten::scaled_dot_product_attention"
LEGACY = Path(__file__).parents[1] / "data" / "legacy"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class MyDecoder(nn.Module):
    """Ids to logits, with attention to split at."""

    def __init__(self, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(16, 32)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Ranker(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x):
        return self.score(x).sigmoid()


class Transformer(nn.Module):
    """Blocks that repeat, as a diffusion transformer has them."""

    _repeated_blocks = ["Block"]

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def build_decoder():
    torch.manual_seed(0)
    return MyDecoder().eval(), (torch.zeros(2, 8, dtype=torch.long),)


def build_ranker():
    torch.manual_seed(0)
    return Ranker().eval(), (torch.randn(4, 8),)


def ranker_target(name="ranker"):
    return stitchcache.Target(name, build_ranker, dynamic_shapes=({0: Dim("batch", 1, 64)},))


def package(name: str) -> None:
    """A package with a module ``serving`` that has a target."""
    Path(name).mkdir()
    source = "from given import ranker_target\n\ntargets = [ranker_target()]\ntarget = targets[0]\n"
    Path(name, "serving.py").write_text(source)


def two_entries() -> tuple[str, str]:
    """Graph hashes of two entries in the default cache."""
    rows = {"dynamic_shapes": ({0: Dim("batch", 1, 64)},), "backend": "eager"}
    found = [
        stitchcache.compile(Ranker(width).eval(), (torch.randn(4, width),), **rows).graph_hash
        for width in (8, 9)
    ]
    return found[0], found[1]


def an_engine() -> dict[str, Any]:
    """What an engine with a splitter of its own has."""
    code = "def execution_fn(x, *, __vllm_submods__):\n"
    code += "    submod_0 = __vllm_submods__[0](x)\n    submod_1 = __vllm_submods__[1](submod_0)\n"
    code += "    return (submod_1,)\n"

    def twice(x):
        return x * 2

    return {
        "key": hashlib.sha256(b"engine").hexdigest(),
        "cache": stitchcache.Cache(),
        "code": code,
        "submod_names": ["submod_0", "submod_1"],
        "consts": [],
        "compiled_bytes": b"twice",
        "load_piece": lambda name, path: twice,
        "f": twice,
        "g": twice,
    }


def readme() -> Given:
    first, second = two_entries()
    package("mypackage")
    _, (ids,) = build_decoder()
    os.mkdir("old")
    for file in LEGACY.glob("a116c9ed*"):
        shutil.copy(file, "old")
        legacy = file.stem
    names = {"MyDecoder": MyDecoder, "example_ids": ids, "ids": ids, "graph_hash": legacy, **an_engine()}
    return names, {"3d94ec": first[:6], "81f0b2": second[:6], "/path/to/old/cache": os.path.abspath("old")}


def tutorial() -> Given:
    # Its first lines make the entry: net.py is run before.
    return {}, {"<first digits of the graph hash>": '"$(stitchcache ls | awk "NR == 2 { print \\$1 }")"'}


def coming_from() -> Given:
    model, (example,) = build_ranker()
    transformer = Transformer().eval()
    names = {"model": model, "example": example, "transformer": transformer}
    return names | {"example_kwargs": {"x": torch.zeros(1, 4, 16)}, **an_engine()}, {}


def howto_explain() -> Given:
    model, (example,) = build_ranker()
    first, second = two_entries()
    package("mypackage")
    names = {"model": model, "example": example, "stitchcache": stitchcache}
    # The target is in the cache, as a miss is a finding; and so are entries that differ.
    stitchcache.prewarm(ranker_target())
    return names, {"3108b4": first[:6], "15acdc": second[:6]}


def howto_fleet() -> Given:
    os.mkdir("serving")
    source = "from given import ranker_target\n\ntargets = [ranker_target()]\n"
    Path("serving", "targets.py").write_text(source)
    from stitchcache.report.preflight import machine_record

    Path("h100.json").write_text(json.dumps({"schema": 1, **machine_record()}))
    return {}, {"/models/cache": os.environ["STITCHCACHE_DIR"]}


def howto_inspect() -> Given:
    return {}, {"3d94ec": two_entries()[0][:6]}


def howto_prewarm() -> Given:
    os.mkdir("serving")
    Path("serving", "models.py").write_text("from given import build_ranker as build_ranker\n")
    return {}, {"/models/cache": os.environ["STITCHCACHE_DIR"]}


def howto_serve() -> Given:
    model, (example,) = build_ranker()
    stitchcache.prewarm(ranker_target("minilm"))
    names = {"model": model, "example": example, "request": torch.randn(4, 8)}
    return names | {"build": build_ranker, "stitchcache": stitchcache}, {}


def howto_sign() -> Given:
    os.mkdir("serving")
    source = "from given import ranker_target\n\ntargets = [ranker_target()]\n"
    Path("serving", "targets.py").write_text(source)
    # One machine stands for both: the key that signs is the one that is trusted.
    return {}, {"ci.pub": os.path.join(os.environ["STITCHCACHE_KEYS"], "id.pub")}


def howto_torch_compile() -> Given:
    _, (ids,) = build_decoder()
    return {"MyDecoder": MyDecoder, "ids": ids, "build": build_decoder, "stitchcache": stitchcache}, {}


def howto_models() -> Given:
    transformer = Transformer().eval()

    class Pipeline:
        def __call__(self, prompt):
            return transformer(x=torch.zeros(1, 4, 16))

        def load_lora_weights(self, *_):
            transformer.blocks[0].qkv.weight.data.mul_(2)

    names = {
        "transformer": transformer,
        "example_kwargs": {"x": torch.zeros(1, 4, 16)},
        "pipeline": Pipeline(),
        "prompt": "a train",
        "stitchcache": stitchcache,
    }
    return names, {}
