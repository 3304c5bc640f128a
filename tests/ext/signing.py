"""Directories of keys, and signed caches, for tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stitchcache.cache import Cache
from stitchcache.ext.sign import Keys
from stitchcache.store.openssh import Signature, read_public


def new_keys(directory: Path, name: str = "ci@example.com") -> Keys:
    keys = Keys(str(directory))
    keys.generate(name)
    return keys


def public(keys: Keys) -> bytes:
    with open(keys.path("id.pub")) as file:
        return read_public(file.readline(), "")[0]


def write_signed(keys: Keys, said: dict[str, object], namespace: str = "stitchcache") -> bytes:
    """A signature on any statement, whatever sense it makes."""
    text = json.dumps(said) + "\n"
    private, own = keys._private()
    made = Signature(text=text, public=own, namespace=namespace, signature=b"")
    signature = private.sign(made.signed)
    return Signature(text=text, public=own, namespace=namespace, signature=signature).armored()


def entry_path(cache: Cache, graph_hash: str) -> Path:
    return cache.root / "entries" / graph_hash[:2] / f"{graph_hash}.stitch"


def open_to_others(root: Path) -> None:
    """As a shared directory that a whole group writes."""
    for directory, _, files in os.walk(root):
        os.chmod(directory, 0o775)
        for name in files:
            os.chmod(os.path.join(directory, name), 0o664)
