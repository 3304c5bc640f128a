"""What leaves a cache and comes into one: signing what is there, bundles."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from stitchcache.artifact.entry import DIGEST_SIZE, encode, packed_digest
from stitchcache.cache import Cache
from stitchcache.errors import UntrustedEntryError
from stitchcache.ext.sign import YEAR, Keys
from stitchcache.store import Area

log = logging.getLogger("stitchcache")


def sign(cache: Cache, graph_hashes: Sequence[str] = (), *, seconds: float = YEAR) -> list[str]:
    """Sign entries of the first root, with the target records that lead to them and their pieces.

    Signing vouches for what is there: only what the cache itself trusts is signed.

    Args:
        cache: Where they are. One with ``trust="owner"`` signs what its user has made.
        graph_hashes: Which ones; all where none is named.
        seconds: How long the signatures are good.

    Returns:
        Graph hashes of what was signed.

    Raises:
        UntrustedEntryError: There is no key, or an entry that was named is not trusted.
        StoreWriteError: The cache cannot be written.
    """
    keys: Keys = cache.keys
    wanted, signed = set(graph_hashes), []
    for item in list(cache._top.items(Area.ENTRIES)):
        try:
            artifact = cache.get(item.key) if not wanted or item.key in wanted else None
        except UntrustedEntryError as error:
            if wanted:
                raise
            log.warning("not signed: %s", error)
            continue
        if artifact is None:
            continue
        digest = encode(artifact)[-DIGEST_SIZE:].hex()
        cache.put(artifact, signature=keys.sign("entry", item.key, digest, seconds=seconds))
        signed.append(item.key)
        for piece in {piece.key: piece for piece in artifact.pieces}.values():
            cache.put_piece(piece.key, piece.backend, piece.blob)
    for item in list(cache._top.items(Area.TARGETS)):
        # The oldest first, so that their order stays.
        for record in reversed(cache.get_target(item.key)):
            if record.graph_hash in signed:
                signature = keys.sign("target", item.key, packed_digest(record), seconds=seconds)
                cache.put_target(item.key, record, signature=signature)
    return sorted(signed)
