"""Every file-system call fails in turn: no wrong hit, no foreign exception, a store that can be repaired."""

from __future__ import annotations

import errno
import gc
import logging
import shutil
import warnings
from pathlib import Path

import pytest
from hostile import Counting, Failing
from stores import artifact, copy_legacy, key, put, read_back, target

from stitchcache.cache import Cache
from stitchcache.errors import StoreError

ERRNOS = [
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.EACCES,
    errno.EROFS,
    errno.ESTALE,
    errno.EINTR,
]
OLD = "a116c9ed46d6207734a43317d30fd88f52ac8634c37d904bbf4e41d865f90475"

CONTENT = {"old": [b"shared", b"of old"], "new": [b"shared", b"of new" * 1000]}


def base(root: Path) -> None:
    """A store with an entry that is whole, one to be evicted, one damaged, an orphan and a legacy entry."""
    cache = Cache(root, durability="fast")
    put(cache, "old", CONTENT["old"])
    cache.put_target(key("target"), target(key("old")))
    damaged = put(cache, "damaged", [b"x"])
    (root / "entries" / damaged.graph_hash[:2] / f"{damaged.graph_hash}.stitch").write_bytes(b"junk")
    copy_legacy([f"{OLD}.msgpack"], root)
    cache.count("hit.direct")


def do_put(cache: Cache, acknowledged: set[str]) -> None:
    refs = [cache.put_blob(content) for content in CONTENT["new"]]
    cache.put_piece(key("piece"), "aoti", refs[0])
    cache.put(artifact("new", refs))
    acknowledged.add("new")
    cache.put_target(key("new target"), target(key("new")))


def do_get(cache: Cache, acknowledged: set[str]) -> None:
    assert read_back(cache, key("old")) in (CONTENT["old"], None)
    assert cache.get(key("damaged")) is None
    cache.get(OLD)
    assert cache.get_target(key("target")) in ((), (target(key("old")),))
    cache.get_piece(key("no piece"))
    cache.entries()
    cache.stats()
    with cache.lock(key("lock"), timeout=0.0):
        pass
    with cache.scratch():
        pass


def do_prune(cache: Cache, acknowledged: set[str]) -> None:
    acknowledged.discard("old")
    cache.plan_prune(max_bytes=0, grace_seconds=0).execute()


def do_verify(cache: Cache, acknowledged: set[str]) -> None:
    cache.verify(repair=True)


def do_migrate(cache: Cache, acknowledged: set[str]) -> None:
    cache.migrate()


OPERATIONS = {"put": do_put, "get": do_get, "prune": do_prune, "verify": do_verify, "migrate": do_migrate}


def check(root: Path, acknowledged: set[str], operation: str) -> None:
    cache = Cache(root, durability="fast")
    for name in ("old", "new"):
        found = read_back(cache, key(name))
        assert found == CONTENT[name] if name in acknowledged else found in (CONTENT[name], None)
    if operation != "prune":
        assert cache.get(OLD) is not None
    cache.verify(repair=True)
    assert cache.verify().clean


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_every_call_fails_in_turn(operation, persistent, tmp_path, full, caplog):
    logging.getLogger("stitchcache").setLevel(logging.CRITICAL)
    base(tmp_path / "base")
    counting = Counting()
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    OPERATIONS[operation](Cache(tmp_path / "dry", _files=counting), {"old"})
    assert len(counting.calls) > 20
    failures = 0
    for at in range(len(counting.calls)):
        for number in ERRNOS if full else (ERRNOS[at % len(ERRNOS)],):
            root = tmp_path / "root"
            shutil.copytree(tmp_path / "base", root)
            acknowledged = {"old"}
            cache = Cache(root, _files=Failing(at, number, persistent=persistent))
            try:
                OPERATIONS[operation](cache, acknowledged)
            except StoreError as error:
                failures += bool(error.path)
            del cache
            gc.collect(0)
            try:
                check(root, acknowledged, operation)
            except BaseException as error:
                error.add_note(f"{operation}, call {at} ({counting.calls[at]}), {errno.errorcode[number]}")
                raise
            shutil.rmtree(root)
    if operation == "get":
        assert failures == 0
    warnings.warn(
        f"{operation}: {len(counting.calls)} calls, {failures} reported", stacklevel=1
    ) if full else None
