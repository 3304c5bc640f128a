"""From an artifact in the cache to a callable: what warm starts do, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stitchcache.artifact.record import Artifact
from stitchcache.cache import Cache
from stitchcache.errors import EntryFormatError
from stitchcache.pieces import get_backend


def load_pieces(
    artifact: Artifact, cache: Cache, device: str, ready: Mapping[tuple[str, str], Any]
) -> dict[str, Any] | None:
    """Load every distinct piece of an artifact.

    Args:
        artifact: From the cache.
        cache: Where its blobs are.
        device: Where pieces run.
        ready: Pieces that are loaded for that device already, by backend and digest of their bytes.

    Returns:
        Piece key to callable; ``None`` if a blob is missing or damaged.

    Raises:
        BackendError: A piece cannot be loaded here.
        UntrustedEntryError: A blob could have been written by others.
    """
    distinct = {piece.key: piece for piece in artifact.pieces}
    paths = cache.blob_paths([piece.blob for piece in distinct.values()])
    pieces: dict[str, Any] = {}
    for piece, path in zip(distinct.values(), paths, strict=True):
        if path is None:
            return None
        loaded = ready.get((piece.backend, piece.blob.digest))
        pieces[piece.key] = loaded or get_backend(piece.backend).load(path, device)
    return pieces


def load_constants(artifact: Artifact, cache: Cache, device: str) -> dict[str, torch.Tensor] | None:
    """Load the tensors that an artifact carries itself.

    Returns:
        Name to tensor; ``None`` if a blob is missing or damaged.
    """
    constants: dict[str, torch.Tensor] = {}
    for binding in artifact.bindings:
        if binding.kind != "constant" or binding.blob is None:
            continue
        from stitchcache.artifact.consts import load_consts

        path = cache.blob_path(binding.blob)
        if path is None:
            return None
        stored = load_consts(path.read_bytes())
        if len(stored) != 1 or not isinstance(stored[0], torch.Tensor):
            raise EntryFormatError(
                f"{path}: constant {binding.name!r} is not a tensor. Run 'stitchcache verify --repair'.",
                path=str(path),
                field=f"bindings[{binding.name}]",
                reason="not a tensor",
            )
        tensor = stored[0]
        constants[binding.name] = tensor if binding.tensor.device == "cpu" else tensor.to(device)
    return constants


def open_artifact(
    artifact: Artifact, cache: Cache, device: str, ready: Mapping[tuple[str, str], Any] | None = None
) -> tuple[dict[str, Any], Mapping[str, Any]] | None:
    """Pieces and constants of an artifact; ``None`` if any blob is missing or damaged."""
    pieces = load_pieces(artifact, cache, device, ready or {})
    constants = load_constants(artifact, cache, device) if pieces is not None else None
    return None if pieces is None or constants is None else (pieces, constants)
