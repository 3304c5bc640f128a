"""Source that a backend generated, kept beside an entry (``prewarm --keep-sources``). It is in no key.

A piece record under the entry's own graph hash names it, so that upkeep treats it like any other blob; it
goes with the entry. The blob is zlib over msgpack: piece key to file name to text.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack

from stitchcache.errors import EntryFormatError, UntrustedEntryError
from stitchcache.store import Area
from stitchcache.types import ENGINE

if TYPE_CHECKING:
    from stitchcache.cache import Cache
    from stitchcache.types import Artifact

Sources = dict[str, dict[str, str]]

_BACKEND = "sources"
_SUFFIXES = (".cpp", ".cu", ".h", ".py")
_MOST_FILE = 8 << 20
_MOST = 256 << 20


def generated_in(directory: Path) -> dict[str, str]:
    """Source files that a backend left where it compiled a piece, by name."""
    found = sorted(path for path in directory.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    texts = {path.name: path.read_bytes()[:_MOST_FILE].decode("utf-8", "replace") for path in found}
    return {name: text for name, text in texts.items() if text}


def keep_sources(cache: Cache, graph_hash: str, sources: Mapping[str, Mapping[str, str]]) -> None:
    """Keep the source of some pieces beside a stored entry; a ``StoreWriteError`` where it cannot be."""
    every = {**kept_sources(cache, graph_hash), **sources}
    blob = cache.put_blob(zlib.compress(msgpack.packb(every), 9))
    cache.put_piece(graph_hash, _BACKEND, blob)
    # The record names it from now on.
    cache.release([blob])


def kept_sources(cache: Cache, graph_hash: str) -> Sources:
    """The source of an entry's pieces by key, as far as it was kept; it is shown, and never run."""
    from stitchcache.artifact.entry import decode_piece

    with suppress(UntrustedEntryError):
        record = cache.record(Area.PIECES, graph_hash, decode_piece)
        if record is not None and record.backend == _BACKEND:
            with cache.opened([record.blob]) as (path,):
                return {} if path is None else _decoded(path.read_bytes(), str(path))
    return {}


def unkept(artifact: Artifact, cache: Cache) -> list[str]:
    """Keys of the pieces that a compiler made and whose source is not kept."""
    kept = kept_sources(cache, artifact.graph_hash)
    made = dict.fromkeys(piece.key for piece in artifact.pieces if piece.backend not in ("eager", ENGINE))
    return [key for key in made if key not in kept]


def _decoded(data: bytes, path: str) -> Sources:
    try:
        found = msgpack.unpackb(zlib.decompressobj().decompress(data, _MOST))
        return {str(key): {str(n): str(t) for n, t in files.items()} for key, files in found.items()}
    except (zlib.error, ValueError, AttributeError, msgpack.UnpackException) as error:
        reason = f"it is no kept source: {error}"
        raise EntryFormatError(f"{path}: {reason}", path=path, field="sources", reason=reason) from error
