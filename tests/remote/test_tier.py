"""What a remote holds, and what nodes take from it: verified, stored locally, and only then used."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from signing import new_keys
from stores import artifact, key, put, read_back, target

from stitchcache.artifact.entry import (
    OUTSIDE,
    Kind,
    decode_signed,
    encode,
    encode_target,
    signature_in,
    signed_digest,
    with_signature,
)
from stitchcache.cache import Cache
from stitchcache.errors import OptionError
from stitchcache.ext.sign import Keys


@pytest.fixture
def uploaded(node, url, keys) -> Cache:
    """A node that compiled two entries, which share a blob, and uploaded them."""
    cache = node(url, "builder")
    put(cache, "a", [b"one" * 200, b"shared"], label="ranker")
    put(cache, "b", [b"shared", b""], label="encoder")
    cache.put_target(key("t"), target(key("a")))
    return cache


def remote_path(url: str, name: str) -> Path:
    return Path(url.removeprefix("file://")) / name


def entry_name(graph_hash: str) -> str:
    return f"entries/{graph_hash[:2]}/{graph_hash}.stitch"


def fetched(cache: Cache) -> list[bytes] | None:
    """What a direct hit of the target would load."""
    records = cache.get_target(key("t")) or cache.tier.records(cache, key("t"))
    if not records:
        return None
    graph_hash = records[0].graph_hash
    found = cache.get(graph_hash) or cache.tier.entry(cache, graph_hash)
    return None if found is None else read_back(cache, graph_hash)


# -- from one node to another ----------------------------------------------------------------------


def test_another_node_gets_target_entry_and_blobs_and_needs_the_remote_no_more(
    node, url, uploaded, trusting, monkeypatch
):
    other = node(url, "other")
    assert fetched(other) == [b"one" * 200, b"shared"]
    assert other.verify().clean
    assert signature_in((other.root / entry_name(key("a"))).read_bytes()).startswith(OUTSIDE)
    shutil.rmtree(remote_path(url, ""))
    again = node(url, "other")
    assert fetched(again) == [b"one" * 200, b"shared"]
    assert "tier" not in vars(again), "a local hit does not ask the remote"
    trusting.revoke(trusting.signers()[0].public)
    assert node(url, "other").get_target(key("t")) == (), "what was fetched needs its signature later too"


def test_a_start_from_an_empty_node_asks_two_objects_and_its_distinct_blobs(node, server, keys):
    builder = node("s3://bucket/cache", "builder")
    put(builder, "a", [b"1" * 100_000, b"2", b"1" * 100_000, b"3"])
    builder.put_target(key("t"), target(key("a")))
    server.asked.clear()
    cache = node("s3://bucket/cache")
    assert len(fetched(cache)) == 4
    assert len(server.asked) == 2 + 3 == cache.tier.remote.requests
    assert {verb for verb, _ in server.asked} == {"GET"}
    counted = cache.counted()
    assert (counted["fetched"], counted["fetched.bytes"]) == (1, 100_002)


def test_what_is_uploaded_stands_under_the_names_of_a_root(uploaded, url):
    root = remote_path(url, "")
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    blobs = {
        f"blobs/{d[:2]}/{d}" for name in "ab" for d in (blob.digest for blob in uploaded.get(key(name)).blobs)
    }
    target_name = f"targets/{key('t')[:2]}/{key('t')}"
    assert found == {entry_name(key("a")), entry_name(key("b")), target_name, *blobs}


def test_pieces_are_fetched_by_key(node, url, keys):
    one, other = node(url), node(url)
    ref = one.put_blob(b"compiled")
    one.put_piece(key("p"), "aoti", ref)
    other.tier.pieces(other, [key("p"), key("q")])
    assert other.get_piece(key("p")).blob == ref
    assert other.get_piece(key("q")) is None


def test_nodes_add_their_records_to_a_target(node, url, keys):
    one, two = node(url), node(url)
    for cache, name in ((one, "a"), (two, "b")):
        put(cache, name, [name.encode()])
        cache.put_target(key("t"), replace(target(key(name)), globals=(("mylib:FLAG", name),)))
    third = node(url)
    assert {r.graph_hash for r in third.tier.records(third, key("t"))} == {key("a"), key("b")}
    assert len(one.tier.records(one, key("t"))) == 1, "only what it lacks"


def test_a_target_whose_source_changed_is_replaced(node, url, keys):
    one = node(url)
    for name in "ab":
        put(one, name, [name.encode()])
        one.put_target(key("t"), target(key(name)))
    other = node(url)
    assert [r.graph_hash for r in other.tier.records(other, key("t"))] == [key("b")]


# -- who may, and who may not ----------------------------------------------------------------------


def test_without_a_key_nothing_is_uploaded_and_that_is_said_once(node, url, caplog):
    cache = node(url)
    put(cache, "a", [b"1"])
    put(cache, "b", [b"2"])
    assert not remote_path(url, "").exists() or not any(remote_path(url, "").rglob("*.stitch"))
    said = [r for r in caplog.records if "is not uploaded" in r.getMessage()]
    assert len(said) == 1
    assert "keys generate" in said[0].getMessage()


def test_with_trust_any_no_signature_is_needed(node, url):
    one, other = node(url, trust="any"), node(url, "other", trust="any")
    put(one, "a", [b"1"])
    one.put_target(key("t"), target(key("a")))
    assert fetched(other) == [b"1"]
    assert node(url, "other").get_target(key("t")) == (), "the owner's rule asks for a signature later"


def test_a_read_only_cache_asks_nothing(node, url, uploaded):
    cache = node(url, read_only=True)
    assert fetched(cache) is None
    assert cache.tier.remote.requests == 0


def test_a_full_disk_costs_the_fetch_and_one_warning(node, url, uploaded, caplog, monkeypatch):
    cache = node(url)
    monkeypatch.setattr(
        cache._files, "create", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28)))
    )
    assert fetched(cache) is None
    assert sum("nothing is fetched" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("url", ["http://x", "bucket"])
def test_other_kinds_of_remotes_are_refused(tmp_path, url):
    with pytest.raises(OptionError, match="s3://"):
        Cache(tmp_path, remote=url)


def test_the_environment_names_a_remote(tmp_path, url, monkeypatch):
    monkeypatch.setenv("STITCHCACHE_REMOTE", url)
    assert Cache(tmp_path).remote == url
    assert Cache(tmp_path, remote="").remote == ""
    monkeypatch.setenv("STITCHCACHE_REMOTE_WAIT", "soon")
    with pytest.raises(OptionError, match="STITCHCACHE_REMOTE_WAIT"):
        Cache(tmp_path).tier  # noqa: B018


# -- what a remote may do to its objects -----------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A flipped bit, a cut, or a tail."""
    kind = rng.randrange(3)
    if kind == 0 and data:
        at = rng.randrange(len(data) * 8)
        return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]
    if kind == 1 and data:
        return data[: rng.randrange(len(data))]
    return data + rng.randbytes(1 + rng.randrange(9))


def wrong_objects(url: str, rng: random.Random, own: Keys, stranger: Keys, older: dict[str, bytes]):
    """For ever: an object's name, wrong content for it, and what is wrong."""
    root = remote_path(url, "")
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
    good = {name: remote_path(url, name).read_bytes() for name in names}
    entry, led = entry_name(key("a")), f"targets/{key('t')[:2]}/{key('t')}"
    ours = {hashlib.sha256(content).hexdigest() for content in (b"one" * 200, b"shared")}
    needed = [name for name in names if name in (entry, led) or name.rpartition("/")[2] in ours]
    while True:
        kind = rng.choice(["damaged", "swapped", "stranger", "older", "unsigned"])
        if kind == "damaged":
            name = rng.choice(needed)
            yield name, damaged(rng, good[name]), kind
        elif kind == "swapped":
            name = rng.choice(needed)
            yield name, good[rng.choice([n for n in names if good[n] != good[name]])], kind
        elif kind == "older":
            name = rng.choice(sorted(older))
            yield name, older[name], kind
        elif kind in ("stranger", "unsigned"):
            if rng.random() < 0.5:
                data = with_signature(good[entry], Kind.ENTRY, b"")
                its = stranger.sign("entry", key("a"), signed_digest(data, Kind.ENTRY))
                yield entry, with_signature(data, Kind.ENTRY, its) if kind == "stranger" else data, kind
            else:
                ((record, _),) = decode_signed(good[led], key("t"))
                its = stranger.sign("target", key("t"), "0" * 64) if kind == "stranger" else b""
                yield led, encode_target(key("t"), [record], [its]), kind


def test_wrong_objects_are_never_loaded_each_is_named_and_rebuilt(
    node, url, uploaded, keys, tmp_path, full, caplog, monkeypatch
):
    """Flipped, truncated, another key's, an older version, signed by a stranger, not signed."""
    rng = random.Random(18)
    stranger = new_keys(tmp_path / "stranger", "mallory@example.com")
    # An older version that our own key signed: whoever has seen the newer one does not take it.
    blob = uploaded.put_blob(b"older")
    old = encode(artifact("a", [blob], created=1.0))
    its = keys.sign("entry", key("a"), old[-32:].hex(), created=int(time.time()) - 5000)
    shutil.copytree(uploaded.root / "blobs", remote_path(url, "blobs"), dirs_exist_ok=True)
    older = {entry_name(key("a")): with_signature(old, Kind.ENTRY, its)}
    assert fetched(node(url)) is not None
    wrong = wrong_objects(url, rng, keys, stranger, older)
    for number in range(10_000 if full else 60):
        name, content, kind = next(wrong)
        path = remote_path(url, name)
        before = path.read_bytes()
        path.write_bytes(content)
        caplog.clear()
        cache = node(url, f"try-{number}")
        try:
            assert fetched(cache) is None, (number, kind, name)
            said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
            assert len(said) == 1, (kind, name, said)
            assert name in said[0], (kind, name, said)
            assert {each.problem for each in cache.verify().findings} <= {"stale"}
            if number % 20 == 0:
                # What is compiled then takes the place of what was refused.
                put(cache, "a", [b"one" * 200, b"shared"], label="ranker")
                cache.put_target(key("t"), target(key("a")))
                assert fetched(node(url)) == [b"one" * 200, b"shared"], (kind, name)
                # Signed anew, so what was there before is an older version now.
                wrong = wrong_objects(url, rng, keys, stranger, older)
            else:
                path.write_bytes(before)
        finally:
            shutil.rmtree(cache.root, ignore_errors=True)


def test_an_entry_whose_blob_is_not_there_is_refused_and_replaced(node, url, uploaded, caplog):
    shutil.rmtree(remote_path(url, "blobs"))
    cache = node(url)
    assert fetched(cache) is None
    assert any("and it is gone" in r.getMessage() for r in caplog.records)
    put(cache, "a", [b"compiled anew"])
    assert fetched(node(url)) == [b"compiled anew"]


def test_a_newer_stitchcaches_object_is_left_alone(node, url, uploaded):
    path = remote_path(url, entry_name(key("a")))
    data = bytearray(path.read_bytes())
    data[8:10] = (99).to_bytes(2, "little")
    body = bytes(data[:-32])
    newer = body + hashlib.sha256(body).digest()
    path.write_bytes(newer)
    cache = node(url)
    assert fetched(cache) is None
    put(cache, "a", [b"mine"])
    assert path.read_bytes() == newer


def test_an_object_that_is_too_large_is_not_read(node, url, uploaded, monkeypatch, caplog):
    monkeypatch.setattr("stitchcache.remote.tier.MOST_BYTES", 5000)
    remote_path(url, entry_name(key("a"))).write_bytes(bytes(500_000))
    assert fetched(node(url)) is None
    assert entry_name(key("a")) in caplog.text
