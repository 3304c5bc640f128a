"""Source that a backend generated, kept beside an entry (``prewarm --keep-sources``). It is in no key.

A piece record under the entry's own graph hash names it, so that upkeep treats it like any other blob; it
goes with the entry. The blob is zlib over msgpack: piece key to file name to text.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgpack

from stitchcache.errors import EntryFormatError
from stitchcache.store import Area
from stitchcache.types import ENGINE

if TYPE_CHECKING:
    from pathlib import Path

    from stitchcache.cache import Cache
    from stitchcache.types import Artifact

Sources = dict[str, dict[str, str]]
_BACKEND = "sources"
_MOST = 256 << 20


def generated_in(directory: Path) -> dict[str, str]:
    """Source files that a backend left where it compiled a piece, by name."""
    found = [path for path in directory.rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".py")]
    return {path.name: text for path in sorted(found) if (text := path.read_text("utf-8", "replace"))}


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

    record = cache.record(Area.PIECES, graph_hash, decode_piece)
    if record is None or record.backend != _BACKEND:
        return {}
    with cache.opened([record.blob]) as (path,):
        data = b"" if path is None else path.read_bytes()
    try:
        found = msgpack.unpackb(zlib.decompressobj().decompress(data, _MOST)) if data else {}
        return {str(key): {str(n): str(t) for n, t in files.items()} for key, files in found.items()}
    except (zlib.error, ValueError, AttributeError, msgpack.UnpackException) as error:
        said = f"blob {record.blob.digest[:12]} is no kept source: {error}"
        raise EntryFormatError(said, path="", field="sources", reason=str(error)) from error


def unkept(artifact: Artifact, cache: Cache) -> list[str]:
    """Keys of the pieces that a compiler made and whose source is not kept."""
    kept = kept_sources(cache, artifact.graph_hash)
    made = dict.fromkeys(piece.key for piece in artifact.pieces if piece.backend not in ("eager", ENGINE))
    return [key for key in made if key not in kept]
