"""Processes die anywhere: no wrong hit, nothing acknowledged is lost, and one prune removes what is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

# Imported once, or each forked worker would be importing them, not pruning, when it is killed.
import filelock  # noqa: F401
import pytest
from hostile import Counting, Killing
from stores import artifact, copy_legacy, key, put, read_back, target

import stitchcache.store.evict  # noqa: F401
from stitchcache.cache import Cache

CONTENT = {"old": [b"shared", b"of old"], "new": [b"shared", b"of new" * 1000]}
OLD = "a116c9ed46d6207734a43317d30fd88f52ac8634c37d904bbf4e41d865f90475"


def base(root: Path) -> None:
    cache = Cache(root, durability="fast")
    put(cache, "old", CONTENT["old"])
    cache.put_target(key("target"), target(key("old")))
    copy_legacy([f"{OLD}.msgpack"], root)


def do_put(cache: Cache, report: int) -> None:
    refs = [cache.put_blob(content) for content in CONTENT["new"]]
    cache.put_piece(key("piece"), "aoti", refs[0])
    cache.put(artifact("new", refs))
    os.write(report, b"new\n")
    cache.put_target(key("new target"), target(key("new")))


def do_prune(cache: Cache, report: int) -> None:
    cache.plan_prune(max_bytes=0, grace_seconds=0).execute()


def do_migrate(cache: Cache, report: int) -> None:
    cache.migrate()


OPERATIONS = {"put": do_put, "prune": do_prune, "migrate": do_migrate}


def child(work, *args) -> tuple[int, bytes]:
    """Run in a fork; its exit status, and what it reported before it ended."""
    receive, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(receive)
            work(*args, report)
            status = 0
        finally:
            os._exit(status)
    os.close(report)
    _, status = os.waitpid(pid, 0)
    reported = os.read(receive, 1 << 16)
    os.close(receive)
    return status, reported


def check(root: Path, reported: bytes, *, pruned: bool) -> None:
    cache = Cache(root, durability="fast")
    for name in ("old", "new"):
        found = read_back(cache, key(name))
        if (name.encode() in reported or name == "old") and not pruned:
            assert found == CONTENT[name]
        else:
            assert found in (CONTENT[name], None)
    records = cache.get_target(key("target"))
    # A target never leads to an entry that is gone, or it would be a hit that cannot be served.
    assert all(cache.get(record.graph_hash) is not None for record in records)
    records = cache.get_target(key("new target"))
    assert all(cache.get(record.graph_hash) is not None for record in records)
    assert pruned or cache.get(OLD) is not None
    cache.plan_prune(grace_seconds=0).execute()
    left = [
        path.name for area in ("tmp", "locks") for path in (root / area).glob("*") if path.name != "blobs"
    ]
    assert left == []
    report = cache.verify()
    assert report.findings == ()
    assert pruned or read_back(cache, key("old")) == CONTENT["old"]


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_killed_before_every_system_call(operation, tmp_path):
    base(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    counting = Counting()
    null = os.open(os.devnull, os.O_WRONLY)
    OPERATIONS[operation](Cache(tmp_path / "dry", _files=counting), null)
    os.close(null)
    assert len(counting.calls) > 20
    for at in range(len(counting.calls)):
        root = tmp_path / "root"
        shutil.copytree(tmp_path / "base", root)
        status, reported = child(OPERATIONS[operation], Cache(root, _files=Killing(at)))
        assert os.WIFSIGNALED(status), f"call {at} was not reached"
        try:
            check(root, reported, pruned=operation == "prune")
        except BaseException as error:
            error.add_note(f"killed before call {at} ({counting.calls[at]}) of {operation}")
            raise
        shutil.rmtree(root)


def worker(root: Path, seed: int, report: int) -> None:
    rng = random.Random(seed)
    cache = Cache(root)
    for turn in range(10_000):
        name = rng.randrange(8)
        if rng.random() < 0.15:
            cache.plan_prune(max_files=20, grace_seconds=0).execute()
            os.write(report, b"prune\n")
        else:
            put(cache, name, [b"common", content(name, seed, turn)])
            os.write(report, b"%d %d %d\n" % (name, seed, turn))


def content(name: int, seed: int, turn: int) -> bytes:
    return f"{name} {seed} {turn} ".encode() * 500


def test_random_kills_of_working_processes(tmp_path, full):
    rng = random.Random(0)
    root = tmp_path / "root"
    puts = prunes = kill = 0
    # On a busy machine it takes more of them until something was acknowledged.
    while kill < (2000 if full else 120) or (kill < 10_000 and not (puts and prunes)):
        kill += 1
        receive, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(receive)
                worker(root, kill, report)
            finally:
                os._exit(1)
        os.close(report)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(receive, "rb") as pipe:
            lines = pipe.read().split(b"\n")[:-1]
        prunes += lines.count(b"prune")
        puts += len(lines) - lines.count(b"prune")
        cache = Cache(root, durability="fast")
        for name in range(8):
            found = read_back(cache, key(name))
            if found is None:
                # Evicted (the last prune may not have been reported), or never put; what is lost shows below,
                # where nothing is evicted.
                continue
            assert found[0] == b"common"
            assert found[1].startswith(f"{name} ".encode())
            words = found[1][: len(found[1]) // 500].split()
            assert found[1] == content(*map(int, words))
        assert cache.verify().clean
    cache.plan_prune(grace_seconds=0).execute()
    assert not list((root / "tmp").iterdir())
    assert [path.name for path in (root / "locks").iterdir()] in ([], ["blobs"])
    assert cache.verify().findings == ()
    assert puts
    assert prunes
    print(f"{puts} acknowledged puts, {prunes} prunes", file=sys.stderr)


def test_random_kills_lose_no_acknowledged_put(tmp_path, full):
    """As above without eviction: every acknowledged put must be there, or a later one in its place."""
    rng = random.Random(1)
    root = tmp_path / "root"
    last: dict[int, tuple[int, int]] = {}

    def work(seed: int, report: int) -> None:
        cache = Cache(root)
        for turn in range(10_000):
            name = turn % 5
            put(cache, name, [b"common", content(name, seed, turn)])
            os.write(report, b"%d %d %d\n" % (name, seed, turn))

    for kill in range(2000 if full else 120):
        receive, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(receive)
                work(kill, report)
            finally:
                os._exit(1)
        os.close(report)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(receive, "rb") as pipe:
            for line in pipe.read().split(b"\n")[:-1]:
                name, seed, turn = map(int, line.split())
                last[name] = (seed, turn)
        cache = Cache(root, durability="fast")
        for name, (seed, turn) in last.items():
            found = read_back(cache, key(name))
            assert found is not None
            _, got_seed, got_turn = map(int, found[1][: len(found[1]) // 500].split())
            # One that was being put when its process died may be there, and be newer.
            assert (got_seed, got_turn) >= (seed, turn)
            assert found[1] == content(name, got_seed, got_turn)
        if kill % 20 == 0:
            cache.plan_prune(grace_seconds=0).execute()
            assert not list((root / "tmp").glob("*"))
    assert last
