"""An engine with a splitter and a compiler of its own keeps its stitching code in a stitchcache.

    python docs/examples/engine.py

The first run splits, compiles and saves; every later one only loads. The engine's compiler here is
``torch.export``, which needs no C++. Any other will do that makes bytes of a piece and a callable of bytes.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.passes.split_module import split_module

import stitchcache

# What the engine knows before it traces: its model and itself.
KEY = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()


def model(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    for _ in range(3):
        hidden = torch.relu(torch.matmul(x, up))
        x = torch.cumsum(hidden, 0) @ down  # cumsum stands for attention: an op to split at
    return x


def compile_piece(piece: torch.nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(piece, inputs), buffer)
    return buffer.getvalue()


def load_piece(name: str, path: Path | None) -> Callable[..., Any] | None:
    """The callable of a stored piece; the ops that were split at have none, as the code calls them itself."""
    return None if path is None else torch.export.load(io.BytesIO(path.read_bytes())).module()


class Compiled(torch.nn.Module):
    """Stands for a piece in the stitching graph: what is no GraphModule is called, not written out."""


def split(example: tuple[Tensor, ...]) -> tuple[torch.fx.GraphModule, dict[str, tuple[Tensor, ...]]]:
    """The stitching graph, and what its pieces are called with."""
    traced = torch.fx.symbolic_trace(model)
    number, parts = 0, {}
    for node in traced.graph.nodes:
        number += node.target is torch.cumsum
        parts[node] = number
        number += node.target is torch.cumsum
    stitching = split_module(traced, traced, parts.__getitem__, keep_original_order=True)
    inputs: dict[str, tuple[Tensor, ...]] = {}
    for name, part in stitching.named_children():
        if not any(node.target is torch.cumsum for node in part.graph.nodes):
            part.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, given))
    stitching(*example)
    return stitching, inputs


def build(cache: stitchcache.Cache, example: tuple[Tensor, ...]) -> None:
    """Split, compile each piece, and save the code with the pieces' bytes."""
    stitching, inputs = split(example)
    pieces: dict[str, bytes] = {}
    for name, given in inputs.items():
        pieces[name] = compile_piece(stitching.get_submodule(name), given)
        setattr(stitching, name, Compiled())
    stitchcache.save_execution(cache, KEY, *stitchcache.generate_execution_code(stitching), pieces=pieces)


def main(directory: str | None = None) -> None:
    cache = stitchcache.Cache(directory)
    weights = torch.linspace(-1, 1, 128)
    x, up, down = torch.ones(4, 8), weights.view(8, 16), weights.flip(0).view(16, 8)
    try:
        run, how = stitchcache.load_execution(KEY, load_piece, cache=cache), "loaded"
    except stitchcache.errors.GraphHashError:
        build(cache, (x, up, down))
        run, how = stitchcache.load_execution(KEY, load_piece, cache=cache), "compiled"
    print(how, KEY[:12], "same as the model:", torch.equal(run(x, up, down), model(x, up, down)))


if __name__ == "__main__":
    main(*sys.argv[1:])
