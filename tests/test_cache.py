"""The cache as its callers see it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "store"))
import itertools

from stores import artifact, copy_legacy, files_under, key, put, read_back, target

from stitchcache.cache import Cache
from stitchcache.errors import (
    AmbiguousPrefixError,
    EntryFormatError,
    GraphHashError,
    OptionError,
    StoreError,
    StoreWriteError,
    UntrustedEntryError,
)
from stitchcache.store import parse_size
from stitchcache.types import BlobRef

LEGACY = Path(__file__).parent / "data" / "legacy"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("STITCHCACHE_DIR", "STITCHCACHE_MAX_SIZE", "STITCHCACHE_READONLY"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


# -- entries ---------------------------------------------------------------------------------------


def test_what_is_put_is_got(cache):
    made = put(cache, "a", [b"one", b"two"])
    assert cache.get(made.graph_hash) == made
    assert Cache(cache.root).get(made.graph_hash) == made
    assert read_back(Cache(cache.root), made.graph_hash) == [b"one", b"two"]


def test_a_missing_entry_is_a_miss(cache):
    assert cache.get(key("nothing")) is None
    assert not cache.root.exists()


def test_layout_is_the_promised_one(cache):
    made = put(cache, "a", [b"one"])
    cache.put_target(key("t"), target(made.graph_hash))
    digest = made.pieces[0].blob.digest
    found = [name for name in files_under(cache.root) if not name.startswith("stats")]
    assert found == [
        "CACHEDIR.TAG",
        f"blobs/{digest[:2]}/{digest}",
        f"entries/{made.graph_hash[:2]}/{made.graph_hash}.stitch",
        "locks/blobs",
        f"targets/{key('t')[:2]}/{key('t')}",
    ]
    assert (
        (cache.root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    )


def test_put_is_idempotent_and_replaces_another_artifact_of_the_hash(cache):
    first = put(cache, "a", [b"one"])
    assert cache.put(first) == first.graph_hash
    assert cache.get(first.graph_hash) == first
    second = put(cache, "a", [b"other"])
    assert cache.get(first.graph_hash) == second


def test_an_entry_may_not_name_blobs_that_are_not_there(cache):
    with pytest.raises(StoreError, match="put_blob"):
        cache.put(artifact("a", [BlobRef(digest=key("x"), size=1)]))
    good = cache.put_blob(b"abc")
    with pytest.raises(StoreError, match="put_blob"):
        cache.put(artifact("a", [dataclasses.replace(good, size=4)]))
    assert cache.get(key("a")) is None


def test_a_mistyped_artifact_is_refused_before_anything_is_written(cache):
    bad = dataclasses.replace(artifact("a", []), label=3)
    with pytest.raises(EntryFormatError) as caught:
        cache.put(bad)
    assert caught.value.field == "header.label"
    assert not cache.root.exists()


@pytest.mark.parametrize(
    "bad", ["", "abc", "../" * 20 + "etc/passwd", "A" * 64, "g" * 64, "a" * 63, "a" * 65]
)
def test_only_keys_become_paths(cache, bad):
    for call in (cache.get, cache.get_target, cache.get_piece):
        with pytest.raises(OptionError, match="64 lowercase hex"):
            call(bad)
    with pytest.raises(OptionError), cache.lock(bad):
        pass
    with pytest.raises(OptionError):
        cache.blob_path(BlobRef(digest=bad, size=1))
    with pytest.raises(OptionError):
        cache.put(dataclasses.replace(artifact("a", []), graph_hash=bad))


def test_prefixes(cache):
    hashes = sorted(put(cache, index, []).graph_hash for index in range(40))
    assert cache.find(hashes[3]) == hashes[3]
    assert cache.find(hashes[3][:12].upper()) == hashes[3]
    common = next(a[:1] for a, b in itertools.pairwise(hashes) if a[0] == b[0])
    with pytest.raises(AmbiguousPrefixError) as caught:
        cache.find(common)
    assert len(caught.value.candidates) > 1
    with pytest.raises(GraphHashError, match="no entry"):
        cache.find("0123456789")
    for bad in ("", "xyz", "../..", "a" * 65):
        with pytest.raises(GraphHashError):
            cache.find(bad)


def test_entries_are_listed_by_their_headers_and_damage_is_left_out(cache, caplog):
    made = [put(cache, index, [b"shared", bytes([index])]) for index in range(3)]
    path = cache.root / "entries" / made[0].graph_hash[:2] / f"{made[0].graph_hash}.stitch"
    path.write_bytes(path.read_bytes()[:70] + b"?" + path.read_bytes()[71:])
    with caplog.at_level(logging.WARNING, "stitchcache"):
        headers = cache.entries()
    assert {header.graph_hash for header in headers} == {each.graph_hash for each in made[1:]}
    header = headers[0]
    assert (header.label, header.created, header.compile_seconds) == ("Model", 1.5, 3.0)
    assert (header.pieces, len(header.blobs), header.blob_bytes) == (2, 2, 7)
    assert (header.backends, header.format_version) == (("aoti",), 4)
    assert len(caplog.records) == 1
    assert str(path) in caplog.text


# -- damage ----------------------------------------------------------------------------------------


def test_a_damaged_entry_is_a_miss_one_warning_and_quarantined(cache, caplog):
    made = put(cache, "a", [b"one"])
    path = cache.root / "entries" / made.graph_hash[:2] / f"{made.graph_hash}.stitch"
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "stitchcache"):
        assert cache.get(made.graph_hash) is None
        assert cache.get(made.graph_hash) is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert "digest" in caplog.text
    assert not path.exists()
    notes = list((cache.root / "quarantine").glob("*.reason"))
    assert len(notes) == 1
    assert "digest" in notes[0].read_text()
    assert cache.put(made) == made.graph_hash
    assert cache.get(made.graph_hash) == made
    assert cache.stats().counters["corrupt"] == 1


def test_a_damaged_blob_is_missing_and_a_put_heals_it(cache, caplog):
    made = put(cache, "a", [b"one" * 100])
    path = cache.blob_path(made.pieces[0].blob)
    path.write_bytes(b"two" * 100)
    with caplog.at_level(logging.WARNING, "stitchcache"):
        assert cache.blob_path(made.pieces[0].blob) is None
    assert len(caplog.records) == 1
    assert cache.put_blob(b"one" * 100) == made.pieces[0].blob
    assert read_back(cache, made.graph_hash) == [b"one" * 100]


def test_put_blob_replaces_a_damaged_one_of_the_same_name(cache):
    ref = cache.put_blob(b"good bytes")
    path = cache.root / "blobs" / ref.digest[:2] / ref.digest
    path.write_bytes(b"evil bytes")
    assert cache.put_blob(b"good bytes") == ref
    assert path.read_bytes() == b"good bytes"


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink", "empty"])
def test_odd_files_under_an_entrys_name_are_a_miss(cache, kind, tmp_path):
    made = put(cache, "a", [])
    path = cache.root / "entries" / made.graph_hash[:2] / f"{made.graph_hash}.stitch"
    path.rename(tmp_path / "entry")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":
        path.symlink_to(tmp_path / "entry")
        with pytest.raises(UntrustedEntryError, match="symbolic link"):
            cache.get(made.graph_hash)
        put(cache, "a", [])
        assert cache.get(made.graph_hash) == made
        return
    else:
        path.touch()
    assert cache.get(made.graph_hash) is None


def test_an_entry_under_another_name_is_refused(cache):
    made = put(cache, "a", [])
    source = cache.root / "entries" / made.graph_hash[:2] / f"{made.graph_hash}.stitch"
    other = cache.root / "entries" / key("b")[:2] / f"{key('b')}.stitch"
    other.parent.mkdir(exist_ok=True)
    shutil.copy(source, other)
    assert cache.get(key("b")) is None
    record = target(made.graph_hash)
    cache.put_target(key("t"), record)
    moved = cache.root / "targets" / key("u")[:2] / key("u")
    moved.parent.mkdir(exist_ok=True)
    shutil.copy(cache.root / "targets" / key("t")[:2] / key("t"), moved)
    assert cache.get_target(key("u")) == ()
    assert cache.get_target(key("t")) == (record,)


def test_a_future_format_is_left_alone_and_not_overwritten(cache, caplog):
    import hashlib

    made = put(cache, "a", [])
    path = cache.root / "entries" / made.graph_hash[:2] / f"{made.graph_hash}.stitch"
    body = bytearray(path.read_bytes()[:-32])
    body[8] = 5
    future = bytes(body) + hashlib.sha256(body).digest()
    path.write_bytes(future)
    with caplog.at_level(logging.WARNING, "stitchcache"):
        assert cache.get(made.graph_hash) is None
        assert cache.get(made.graph_hash) is None
    assert len(caplog.records) == 1
    assert "newer" in caplog.text
    with pytest.raises(StoreWriteError, match="newer"):
        cache.put(made)
    plan = cache.plan_prune(max_bytes=0, grace_seconds=0)
    assert plan.unreadable == (str(path),)
    plan.execute()
    assert cache.verify(repair=True).clean
    assert path.read_bytes() == future


# -- pieces, targets -------------------------------------------------------------------------------


def test_pieces_and_targets(cache):
    made = put(cache, "a", [b"one"])
    blob = made.pieces[0].blob
    assert cache.get_piece(key("p")) is None
    cache.put_piece(key("p"), "aoti", blob)
    record = cache.get_piece(key("p"))
    assert (record.key, record.backend, record.blob) == (key("p"), "aoti", blob)
    assert cache.get_target(key("t")) == ()
    cache.put_target(key("t"), target(made.graph_hash))
    assert cache.get_target(key("t")) == (target(made.graph_hash),)


def test_a_future_target_is_left_alone_and_not_overwritten(cache):
    import hashlib

    made = put(cache, "a", [])
    cache.put_target(key("t"), target(made.graph_hash))
    path = cache.root / "targets" / key("t")[:2] / key("t")
    body = bytearray(path.read_bytes()[:-32])
    body[8] = 8
    future = bytes(body) + hashlib.sha256(body).digest()
    path.write_bytes(future)
    assert cache.get_target(key("t")) == ()
    with pytest.raises(StoreWriteError, match="newer"):
        cache.put_target(key("t"), target(made.graph_hash))
    assert path.read_bytes() == future


def test_configurations_with_one_key_have_a_record_each(cache, tmp_path):
    made = [put(cache, name, []) for name in range(12)]
    records = [
        dataclasses.replace(target(each.graph_hash), globals=(("mylib:FLAG", str(index)),))
        for index, each in enumerate(made)
    ]
    for index, record in enumerate(records[:3]):
        cache.put_target(key("t"), record)
        assert cache.get_target(key("t")) == tuple(reversed(records[: index + 1]))
    again = dataclasses.replace(records[0], graph_hash=made[5].graph_hash, refused="it reads a clock")
    cache.put_target(key("t"), again)
    assert cache.get_target(key("t")) == (again, records[2], records[1])
    for record in records:
        cache.put_target(key("t"), record)
    assert cache.get_target(key("t")) == tuple(reversed(records))[:8]
    above = Cache([tmp_path / "above", cache.root])
    above.put_target(key("t"), records[0])
    assert above.get_target(key("t")) == (records[0], *tuple(reversed(records))[:7])
    assert cache.get_target(key("t")) == tuple(reversed(records))[:8]


def test_a_target_goes_with_the_last_of_its_entries(cache):
    old, new = put(cache, "old", []), put(cache, "new", [])
    paths = [cache.root / "entries" / e.graph_hash[:2] / f"{e.graph_hash}.stitch" for e in (old, new)]
    os.utime(paths[0], (1.0, 1.0))
    first, second = target(old.graph_hash), dataclasses.replace(target(new.graph_hash), globals=())
    cache.put_target(key("t"), first)
    cache.put_target(key("t"), second)
    plan = cache.plan_prune(max_age=1000.0)
    assert ([item.key for item, _ in plan.entries], plan.targets) == ([old.graph_hash], ())
    plan.execute()
    assert cache.get_target(key("t")) == (second, first)
    assert cache.verify().clean
    paths[1].unlink()
    assert [finding.problem for finding in cache.verify(repair=True).findings] == ["stale"]
    assert cache.get_target(key("t")) == ()


def test_a_piece_whose_blob_is_gone_is_a_miss(cache):
    ref = cache.put_blob(b"one")
    cache.put_piece(key("p"), "aoti", ref)
    fresh = Cache(cache.root)
    (cache.root / "blobs" / ref.digest[:2] / ref.digest).unlink()
    assert fresh.get_piece(key("p")) is None


def test_put_blob_from_a_file(cache, tmp_path):
    (tmp_path / "piece.so").write_bytes(b"x" * 3_000_000)
    ref = cache.put_blob(tmp_path / "piece.so")
    assert ref.size == 3_000_000
    assert cache.blob_path(ref).read_bytes() == b"x" * 3_000_000
    with pytest.raises(StoreError, match=r"nothing\.so"):
        cache.put_blob(tmp_path / "nothing.so")


# -- trust -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "shard", "area", "root"])
def test_what_others_can_write_is_not_trusted(cache, where):
    made = put(cache, "a", [b"one"])
    blob = cache.blob_path(made.pieces[0].blob)
    entry = cache.root / "entries" / made.graph_hash[:2] / f"{made.graph_hash}.stitch"
    for path, use in (
        (blob, lambda: cache.blob_path(made.pieces[0].blob)),
        (entry, lambda: cache.get(made.graph_hash)),
    ):
        place = {"file": path, "shard": path.parent, "area": path.parent.parent, "root": cache.root}[where]
        mode = stat.S_IMODE(place.stat().st_mode)
        for bad in (0o020, 0o002):
            place.chmod(mode | bad)
            with pytest.raises(UntrustedEntryError) as caught:
                use()
            assert caught.value.path == str(path)
            assert str(place) in str(caught.value)
        place.chmod(mode)
        assert use()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_another_users_files_are_not_trusted(cache):
    made = put(cache, "a", [b"one"])
    blob = cache.blob_path(made.pieces[0].blob)
    os.chown(blob, 12345, 12345)
    with pytest.raises(UntrustedEntryError, match="12345"):
        cache.blob_path(made.pieces[0].blob)
    cache.put_target(key("t"), target(made.graph_hash))
    os.chown(cache.root / "targets" / key("t")[:2] / key("t"), 12345, 12345)
    assert cache.get_target(key("t")) == ()


def test_files_are_writable_by_their_owner_alone_whatever_the_umask(tmp_path):
    script = """
import os, sys
sys.path.insert(0, sys.argv[2])
os.umask(0)
from stitchcache.cache import Cache
from stores import put
put(Cache(sys.argv[1]), "a", [b"one"])
"""
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "c", Path(__file__).parent / "store"], check=True
    )
    for path in [tmp_path / "c", *(tmp_path / "c").rglob("*")]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path


# -- places that cannot be written -----------------------------------------------------------------


def test_a_root_that_is_a_file_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="STITCHCACHE_DIR"):
        Cache(tmp_path / "file")
    below = Cache(tmp_path / "file" / "below")
    assert below.get(key("a")) is None
    with pytest.raises(StoreWriteError):
        below.put_blob(b"x")
    with below.lock(key("a")) as held:
        assert not held
    with below.scratch() as path:
        assert path.is_dir()


def test_read_only_serves_and_writes_nothing(cache, monkeypatch):
    made = put(cache, "a", [b"one"])
    before = files_under(cache.root)
    monkeypatch.setenv("STITCHCACHE_READONLY", "1")
    reader = Cache(cache.root)
    assert read_back(reader, made.graph_hash) == [b"one"]
    for call in (
        lambda: reader.put(made),
        lambda: reader.put_blob(b"x"),
        lambda: reader.put_target(key("t"), target(made.graph_hash)),
    ):
        with pytest.raises(StoreWriteError) as caught:
            call()
        assert caught.value.reason == "read-only"
    with reader.lock(key("a")) as held:
        assert held is False
    (cache.root / "entries" / made.graph_hash[:2] / f"{made.graph_hash}.stitch").write_bytes(b"damage")
    assert reader.get(made.graph_hash) is None
    assert [name for name in files_under(cache.root) if not name.startswith("stats")] == [
        name for name in before if not name.startswith("stats")
    ]


def test_layers_are_searched_in_order_and_only_the_first_is_written(tmp_path):
    baked = Cache(tmp_path / "baked")
    old = put(baked, "a", [b"baked"])
    baked.put_piece(key("p"), "aoti", old.pieces[0].blob)
    baked.put_target(key("t"), target(old.graph_hash))
    before = files_under(baked.root)
    both = Cache([tmp_path / "top", tmp_path / "baked"])
    assert read_back(both, old.graph_hash) == [b"baked"]
    assert both.get_piece(key("p")).blob == old.pieces[0].blob
    assert both.get_target(key("t"))
    assert not (tmp_path / "top").exists()
    mixed = artifact("b", [old.pieces[0].blob, both.put_blob(b"new")])
    both.put(mixed)
    assert read_back(both, mixed.graph_hash) == [b"baked", b"new"]
    assert {header.graph_hash for header in both.entries()} == {old.graph_hash, mixed.graph_hash}
    both.put_target(key("u"), target(old.graph_hash))
    both.plan_prune(grace_seconds=0).execute()
    assert both.get_target(key("u"))
    assert both.verify().clean
    assert files_under(baked.root) == before


# -- settings --------------------------------------------------------------------------------------


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("STITCHCACHE_DIR", str(tmp_path / "x"))
    assert Cache().root == tmp_path / "x"
    assert Cache(tmp_path / "y").root == tmp_path / "y"
    monkeypatch.delenv("STITCHCACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().root == tmp_path / "xdg" / "stitchcache"


@pytest.mark.parametrize(
    ("text", "size"), [("10G", 10 << 30), ("1.5 MiB", 3 << 19), ("7", 7), ("2kb", 2048), ("1T", 1 << 40)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("bad", ["ten", "-1", "10X", "G", "1e9"])
def test_bad_settings_name_the_variable(bad, monkeypatch):
    monkeypatch.setenv("STITCHCACHE_MAX_SIZE", bad)
    with pytest.raises(OptionError, match="STITCHCACHE_MAX_SIZE"):
        Cache("/nowhere")
    monkeypatch.delenv("STITCHCACHE_MAX_SIZE")
    monkeypatch.setenv("STITCHCACHE_READONLY", bad)
    with pytest.raises(OptionError, match="STITCHCACHE_READONLY"):
        Cache("/nowhere")


def test_importing_it_is_light():
    script = (
        "import sys, stitchcache.cache\n"
        "print([m for m in ('torch', 'rich', 'click', 'filelock') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- older formats ---------------------------------------------------------------------------------


def legacy_cases():
    return json.loads((LEGACY / "cases.json").read_text())


@pytest.fixture
def old_root(tmp_path):
    root = tmp_path / "old"
    root.mkdir()
    copy_legacy([case["file"] for case in legacy_cases()], root)
    return root


def test_legacy_entries_are_found_and_listed(old_root):
    cache = Cache(old_root)
    for case in legacy_cases():
        found = cache.get(case["graph_hash"])
        assert found.format_version == case["format"]
        assert "execution_fn" in found.code
        assert cache.find(case["graph_hash"][:10]) == case["graph_hash"]
    assert sorted(header.format_version for header in cache.entries()) == [0, 1, 1, 2, 2]
    assert cache.verify().clean


def test_migrate_loses_nothing_and_is_idempotent(old_root):
    cache = Cache(old_root)
    before = {case["graph_hash"]: cache.get(case["graph_hash"]) for case in legacy_cases()}
    assert sorted(cache.migrate()) == sorted(before)
    assert cache.migrate() == []
    assert not list(old_root.glob("*.pkl"))
    assert not list(old_root.glob("*.msgpack"))
    for graph_hash, old in before.items():
        new = cache.get(graph_hash)
        assert new == dataclasses.replace(old, format_version=4)


def test_a_damaged_legacy_entry_is_not_migrated_and_not_lost(old_root, caplog):
    name = legacy_cases()[0]["file"]
    (old_root / name).write_bytes(b"\x84junk")
    with caplog.at_level(logging.WARNING, "stitchcache"):
        assert len(Cache(old_root).migrate()) == 4
    assert name in caplog.text
    assert (old_root / name).read_bytes() == b"\x84junk"


def test_migrate_makes_nothing_its_users_own_that_others_could_have_written(old_root, caplog):
    name = legacy_cases()[0]["file"]
    (old_root / name).chmod(0o666)
    with caplog.at_level(logging.WARNING, "stitchcache"):
        assert len(Cache(old_root).migrate()) == 4
        assert Cache(old_root, trust="signed").migrate() == []
    assert f"{name} has mode 0666" in caplog.text
    assert (old_root / name).exists()


def test_migrate_on_a_read_only_store_says_so_and_loses_nothing(old_root):
    before = files_under(old_root)
    with pytest.raises(StoreWriteError):
        Cache(old_root, read_only=True).migrate()
    assert files_under(old_root) == before
