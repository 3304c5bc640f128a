"""Prepare a call's example arguments for the exporter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stitchcache.pieces.check import clone_all
from stitchcache.torchside.tensors import has_fakes, storage_id


def separate(leaves: Sequence[Any], state: Sequence[torch.Tensor]) -> list[Any]:
    """Copy tensors that share memory with an earlier leaf or with the model.

    The exporter takes two arguments that are one tensor for one input, and the graph would compute
    with the wrong one as soon as a call brings two.

    Args:
        leaves: Example leaves.
        state: Tensors of the model.

    Returns:
        Leaves, none of which shares memory with another.
    """
    seen = {storage_id(tensor) for tensor in state if _has_storage(tensor)}
    separated: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and _has_storage(leaf):
            if storage_id(leaf) in seen:
                leaf = leaf.clone() if has_fakes([leaf]) else clone_all([leaf.detach()])[0]
            seen.add(storage_id(leaf))
        separated.append(leaf)
    return separated


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided
