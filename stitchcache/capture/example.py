"""Prepare a call's example arguments for the exporter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stitchcache.errors import CaptureError
from stitchcache.pieces.check import clone_all
from stitchcache.torchside.tensors import has_fakes, storage_id, version_of


def separate(leaves: Sequence[Any], model: torch.nn.Module) -> list[Any]:
    """Copy tensors that share memory with an earlier leaf or with the model.

    The exporter takes two arguments that are one tensor for one input, and the graph would compute
    with the wrong one as soon as a call brings two.

    Args:
        leaves: Example leaves.
        model: Its tensors count as seen.

    Returns:
        Leaves, none of which shares memory with another.
    """
    seen = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers()) if _has_storage(tensor)}
    separated: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and _has_storage(leaf):
            if _storage(leaf) in seen:
                leaf = leaf.clone() if has_fakes([leaf]) else clone_all([leaf.detach()])[0]
            seen.add(_storage(leaf))
        separated.append(leaf)
    return separated


@contextmanager
def attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Refuse a forward that writes into a tensor that is a plain attribute, and undo what it wrote.

    The exporter runs such a write for real, on the model's own tensor, and what it makes of the
    attribute is a constant.

    Raises:
        CaptureError: The forward wrote into such a tensor.
    """
    kept = [
        (name, key, value, version_of(value), value.detach().clone())
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and not value.is_inference() and not has_fakes([value])
    ]
    changed = ""
    try:
        yield
    finally:
        for name, key, value, version, copy in kept:
            if version_of(value) != version:
                changed = f"{name}.{key}".lstrip(".")
                with torch.no_grad():
                    value.copy_(copy)
    if changed:
        raise CaptureError(
            f"the forward writes into {changed!r}, a tensor that is a plain attribute of the model, so "
            "the capture would take it for a constant. Make it a buffer: "
            f"register_buffer({changed.rpartition('.')[2]!r}, ..., persistent=False).",
            reason=f"write into plain attribute {changed}",
        )


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided


def _storage(tensor: torch.Tensor) -> int:
    return storage_id(tensor)
