"""Real file systems that are full, out of inodes, read-only or noexec; skipped where none can be mounted."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from stores import key, put, read_back

from stitchcache.cache import Cache
from stitchcache.errors import StoreWriteError
from stitchcache.store.probe import probe


@contextmanager
def mounted(place, options):
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"mode=0755,{options}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.parametrize("options", ["size=512k", "size=8m,nr_inodes=40"])
def test_a_full_disk_refuses_puts_and_serves_what_it_has(tmp_path, options):
    with mounted(tmp_path / "disk", options) as place:
        cache = Cache(place / "cache")
        made, failures = [], 0
        for index in range(40):
            try:
                made.append(put(cache, index, [os.urandom(30_000)]))
            except StoreWriteError as error:
                failures += "disk is full" in str(error)
        assert made
        assert failures
        fresh = Cache(place / "cache")
        for each in made:
            assert read_back(fresh, each.graph_hash) is not None
        assert fresh.verify().clean
        with fresh.scratch() as scratch:
            assert scratch.is_dir()
        levels = {trial.name: trial.level for trial in probe(str(place / "cache"))}
        assert levels["space"] == "problem"
        # Nothing half-written keeps the disk full.
        del cache
        fresh.plan_prune(max_files=len(made), grace_seconds=0).execute()
        put(Cache(place / "cache"), "again", [b"small"])


def test_a_read_only_mount_serves_and_says_why_it_stores_nothing(tmp_path):
    with mounted(tmp_path / "disk", "size=8m") as place:
        cache = Cache(place / "cache")
        made, damaged = put(cache, "a", [b"one"]), put(cache, "b", [b"two"])
        path = place / "cache" / "entries" / damaged.graph_hash[:2] / f"{damaged.graph_hash}.stitch"
        path.write_bytes(b"junk")
        del cache
        remount(place, "ro")
        reader = Cache(place / "cache")
        assert read_back(reader, made.graph_hash) == [b"one"]
        assert reader.get(damaged.graph_hash) is None
        with pytest.raises(StoreWriteError, match="Read-only file system"):
            put(reader, "c", [b"three"])
        with reader.lock(key("c")) as held:
            assert held is False
        assert not reader.verify(repair=True).clean
        layered = Cache([tmp_path / "top", place / "cache"])
        assert read_back(layered, made.graph_hash) == [b"one"]
        put(layered, "c", [b"one", b"three"])
        assert read_back(layered, key("c")) == [b"one", b"three"]


def test_a_noexec_mount_is_noted_by_the_doctor(tmp_path):
    with mounted(tmp_path / "disk", "size=8m,noexec") as place:
        levels = {trial.name: trial for trial in probe(str(place))}
        assert levels["exec"].level == "note"
        assert "noexec" in levels["exec"].meaning


def test_a_cache_that_is_removed_while_in_use_is_made_again(tmp_path):
    cache = Cache(tmp_path / "cache")
    put(cache, "a", [b"one"])
    shutil.rmtree(tmp_path / "cache")
    assert cache.get(key("a")) is None
    assert read_back(cache, put(cache, "a", [b"one"]).graph_hash) == [b"one"]
    shutil.rmtree(tmp_path / "cache" / "entries")
    assert read_back(cache, put(cache, "a", [b"one"]).graph_hash) == [b"one"]
    assert cache.verify().clean


def test_a_root_reached_through_a_link_and_moved_afterwards(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    (tmp_path / "real").chmod(0o755)
    made = put(Cache(tmp_path / "link"), "a", [b"one"])
    (tmp_path / "real").rename(tmp_path / "moved")
    assert read_back(Cache(tmp_path / "moved"), made.graph_hash) == [b"one"]
