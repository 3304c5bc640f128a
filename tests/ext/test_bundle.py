"""Bundles: what travels, and what a hostile one is refused for. Refused means that nothing was stored."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

from signing import entry_path, new_keys, public
from stores import files_under, key, put, read_back, target

from stitchcache.artifact.entry import (
    OUTSIDE,
    Kind,
    decode_signed,
    encode_target,
    open_frame,
    seal,
    signature_in,
    with_signature,
)
from stitchcache.cache import Cache
from stitchcache.errors import EntryFormatError, OptionError, StoreError, UntrustedEntryError
from stitchcache.ext.bundle import header, import_bundle
from stitchcache.ext.export import export_bundle, put_member, sign
from stitchcache.ext.sign import Keys
from stitchcache.types import BlobRef, TargetRecord


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """Two entries that share a blob, and a target of the first, on the machine that compiles."""
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "ci"))
    new_keys(tmp_path / "ci")
    cache = Cache(tmp_path / "built")
    put(cache, "a", [b"one" * 200, b"shared"], label="ranker")
    put(cache, "b", [b"shared", b""], label="encoder")
    cache.put_target(key("t"), target(key("a")))
    return cache


@pytest.fixture
def bundle(builder, tmp_path):
    export_bundle(builder, tmp_path / "x.bundle")
    return tmp_path / "x.bundle"


@pytest.fixture
def server(bundle, tmp_path, monkeypatch):
    """An empty cache on a machine that trusts the builder's key, and has none of its own."""
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "serving"))
    keys = Keys()
    keys.trust(public(Keys(str(tmp_path / "ci"))), "ci@example.com", {})
    return Cache(tmp_path / "served")


def members(data: bytes) -> list[list]:
    """Names and contents, the signature apart."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [[m.name, tar.extractfile(m).read()] for m in tar if m.name != "signature"]


def packed(found, keys: Keys, *, raw: bytes = b"") -> bytes:
    """A bundle of any members, rightly signed."""
    body = b"".join(header(n, len(c)) + c + bytes(-len(c) % 512) for n, c in found) + raw
    digest = hashlib.sha256(body).hexdigest()
    signature = keys.sign("bundle", digest, digest)
    return body + header("signature", len(signature)) + signature + bytes(-len(signature) % 512 + 1024)


# -- what travels ----------------------------------------------------------------------------------


def test_a_bundle_brings_entries_blobs_and_targets_and_is_served(server, bundle):
    done = import_bundle(server, bundle)
    assert (done.signer, set(done.entries), done.targets) == ("ci@example.com", {key("a"), key("b")}, 1)
    assert read_back(server, key("a")) == [b"one" * 200, b"shared"]
    assert read_back(server, key("b")) == [b"shared", b""]
    assert server.get_target(key("t")) == (target(key("a")),)
    assert server.verify().clean
    assert import_bundle(server, bundle).kept == done.entries


def test_what_was_imported_needs_its_signature_whoever_owns_it_now(server, bundle):
    import_bundle(server, bundle)
    keys = Keys()
    assert signature_in(entry_path(server, key("a")).read_bytes()).startswith(OUTSIDE)
    keys.revoke(keys.signers()[0].public)
    for trust in ("owner", "signed"):
        again = Cache(server.root, trust=trust)
        with pytest.raises(UntrustedEntryError, match="revoked"):
            again.get(key("a"))
        assert again.get_target(key("t")) == ()
    assert not Cache(server.root).verify().clean
    # The user may say that nothing is asked, and what is compiled here takes the place of what came.
    assert Cache(server.root, trust="any").get(key("a")) is not None
    put(Cache(server.root), "a", [b"one" * 200, b"shared"])
    assert Cache(server.root).get(key("a")) is not None


def test_equal_caches_give_equal_bundles_without_paths_or_owners(builder, bundle, tmp_path):
    shutil.copytree(builder.root, tmp_path / "elsewhere")
    export_bundle(Cache(tmp_path / "elsewhere"), tmp_path / "y.bundle")
    data = bundle.read_bytes()
    assert (tmp_path / "y.bundle").read_bytes() == data
    for word in (str(tmp_path), os.uname().nodename, "root"):
        # Two letters are somewhere in any signature.
        assert len(word) < 4 or word.encode() not in data
    listed = subprocess.run(["tar", "-tvf", bundle], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert names == [*sorted(names[:2]), names[2], *sorted(names[3:6]), "signature"]
    assert "1970-01-01" in listed


def test_filters_choose_entries_with_what_they_need(builder, tmp_path):
    path = tmp_path / "some.bundle"
    assert export_bundle(builder, path, label="rank*").entries == (key("a"),)
    assert export_bundle(builder, path, target=key("t")[:5]).entries == (key("a"),)
    only = export_bundle(builder, path, [key("b")])
    assert (only.entries, only.targets) == ((key("b"),), 0)
    assert [name.split("/")[0] for name, _ in members(path.read_bytes())] == ["entries", "blobs", "blobs"]
    for nothing in ({"label": "none"}, {"max_age": 60.0}, {"target": "0" * 64}):
        with pytest.raises(StoreError, match="is asked for"):
            export_bundle(builder, path, **nothing)


def test_export_needs_a_key_and_exports_only_what_is_trusted(builder, tmp_path, monkeypatch):
    entry_path(builder, key("b")).chmod(0o666)
    assert export_bundle(builder, tmp_path / "x").entries == (key("a"),)
    with pytest.raises(UntrustedEntryError):
        export_bundle(builder, tmp_path / "x", [key("b")])
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "none"))
    before = files_under(tmp_path)
    with pytest.raises(UntrustedEntryError, match="keys generate"):
        export_bundle(Cache(builder.root), tmp_path / "z")
    assert files_under(tmp_path) == before


def test_a_blob_for_which_tar_has_no_room_is_an_error_of_ours(builder):
    with pytest.raises(StoreError, match="8 GiB"):
        put_member(print, builder, "blobs/aa/" + "aa" * 32, BlobRef(digest="aa" * 32, size=8 << 30))


def test_ones_own_and_newer_entries_stay(server, bundle, tmp_path, monkeypatch):
    put(server, "a", [b"mine"])
    server.put_target(key("t"), target(key("a")))
    assert import_bundle(server, bundle).kept == (key("a"),)
    assert read_back(server, key("a")) == [b"mine"]
    data = (server.root / "targets" / key("t")[:2] / key("t")).read_bytes()
    assert [signature for _, signature in decode_signed(data, key("t"))] == [b""]
    # A newer bundle, and then the older one again.
    serving = os.environ["STITCHCACHE_KEYS"]
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "ci"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(os.stat(bundle).st_mtime) + 60))
    later = Cache(tmp_path / "later")
    put(later, "b", [b"newer"])
    export_bundle(later, tmp_path / "newer.bundle")
    monkeypatch.setenv("STITCHCACHE_KEYS", serving)
    assert import_bundle(Cache(server.root), tmp_path / "newer.bundle").kept == ()
    assert read_back(Cache(server.root), key("b")) == [b"newer"]
    assert key("b") in import_bundle(Cache(server.root), bundle).kept
    assert read_back(Cache(server.root), key("b")) == [b"newer"]


def test_imported_entries_can_be_exported_and_signed_anew(server, bundle, tmp_path, monkeypatch):
    import_bundle(server, bundle)
    new = tmp_path / "keys2"
    monkeypatch.setenv("STITCHCACHE_KEYS", str(new))
    own = new_keys(new, "second@example.com")
    own.trust(public(Keys(str(tmp_path / "ci"))), "ci@example.com", {})
    export_bundle(Cache(server.root), tmp_path / "again.bundle")
    own.revoke(public(Keys(str(tmp_path / "ci"))))
    fresh = Cache(tmp_path / "fresh")
    assert import_bundle(fresh, tmp_path / "again.bundle").signer == "second@example.com"
    assert read_back(fresh, key("a")) == [b"one" * 200, b"shared"]
    # Signing what nobody trusts any more would launder it.
    assert sign(Cache(server.root)) == []


# -- hostile bundles -------------------------------------------------------------------------------


def refuse(server, path, data, error=EntryFormatError, match=None):
    path.write_bytes(data)
    before = files_under(server.root) if server.root.exists() else []
    outside = files_under(server.root.parent)
    with pytest.raises(error, match=match):
        import_bundle(server, path)
    assert (files_under(server.root) if server.root.exists() else []) == before
    seen = {name for name in set(files_under(server.root.parent)) - set(outside) if "seen" not in name}
    assert seen == set()


def test_a_bundle_of_nobody_one_knows_is_refused(server, bundle, tmp_path):
    stranger = new_keys(tmp_path / "stranger")
    refuse(server, bundle, packed(members(bundle.read_bytes()), stranger), UntrustedEntryError, "lets ci@")


def test_any_change_is_refused_whole(server, bundle):
    data = bundle.read_bytes()
    step = 97
    for at in range(0, len(data), step):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        refuse(server, bundle, changed, (EntryFormatError, UntrustedEntryError))
    for end in range(0, len(data), 311):
        refuse(server, bundle, data[:end], (EntryFormatError, UntrustedEntryError))
    for more in (b"\0", b"x" * 512, bytes(10240), data):
        refuse(server, bundle, data + more)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "entries/../../evil", "blobs/aa/\0", "locks/x.lock", "blobs", "",
     "./blobs/aa/" + "aa" * 32, "blobs/ab/" + "aa" * 32, "blobs/aa/" + "AA" * 32, "entries/aa/" + "aa" * 32,
     "blobs/aa/" + "aa" * 32 + ".stitch", "pieces/aa/" + "aa" * 32, "bl\u00f6bs/x", "entries/" + "a" * 90],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(server, bundle, tmp_path, name):
    found = members(bundle.read_bytes())
    info = tarfile.TarInfo("x")
    info.size, info.mode = 1, 0o644
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    raw = name.encode()
    block[:100] = raw[:100].ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    evil = bytes(block) + b"x" + bytes(511)
    keys = Keys(str(tmp_path / "ci"))
    body = b"".join(header(n, len(c)) + c + bytes(-len(c) % 512) for n, c in found)
    digest = hashlib.sha256(evil + body).hexdigest()
    signature = keys.sign("bundle", digest, digest)
    end = header("signature", len(signature)) + signature + bytes(-len(signature) % 512 + 1024)
    refuse(server, bundle, evil + body + end)


@pytest.mark.parametrize(
    ("kind", "more"),
    [(tarfile.SYMTYPE, {"linkname": "/etc/passwd"}), (tarfile.LNKTYPE, {"linkname": "entries/x"}),
     (tarfile.FIFOTYPE, {}), (tarfile.CHRTYPE, {}), (tarfile.DIRTYPE, {}), (tarfile.GNUTYPE_SPARSE, {}),
     (tarfile.REGTYPE, {"mode": 0o4755}), (tarfile.REGTYPE, {"uname": "x"}), (tarfile.REGTYPE, {"mtime": 1}),
     (tarfile.XHDTYPE, {}), (tarfile.GNUTYPE_LONGNAME, {})],
)  # fmt: skip
def test_members_that_are_no_plain_files_are_refused(server, bundle, tmp_path, kind, more):
    info = tarfile.TarInfo("blobs/aa/" + "aa" * 32)
    info.type, info.mode = kind, 0o644
    for field, value in more.items():
        setattr(info, field, value)
    raw = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    found = members(bundle.read_bytes())
    refuse(server, bundle, packed(found, Keys(str(tmp_path / "ci")), raw=raw))


def test_members_twice_out_of_order_missing_or_left_over_are_refused(server, bundle, tmp_path):
    found, keys = members(bundle.read_bytes()), Keys(str(tmp_path / "ci"))
    extra = hashlib.sha256(b"extra").hexdigest()
    empty = next(name for name, content in found if content == b"")
    cases = {
        "twice": [*found[:1], found[0], *found[1:]],
        "other content twice": [*found, [found[-1][0], b"other"]],
        "order": found[::-1],
        "blob missing": [each for each in found if each[0] != empty],
        "entry missing": found[1:],
        "blob left over": sorted([*found[3:], [f"blobs/{extra[:2]}/{extra}", b"extra"]]),
        "blob changed": [[n, c + b"x" if n.startswith("blobs") else c] for n, c in found],
    }
    cases["blob left over"] = [*found[:3], *cases["blob left over"]]
    for wrong in cases.values():
        refuse(server, bundle, packed(wrong, keys), (EntryFormatError, UntrustedEntryError))


def test_entries_and_records_without_a_signature_of_their_own_are_refused(server, bundle, tmp_path):
    """Whoever signs a bundle need not be the one whose entries run: each is checked at each start."""
    found, keys = members(bundle.read_bytes()), Keys(str(tmp_path / "ci"))
    entry = [[n, with_signature(c, Kind.ENTRY, b"") if n.startswith("entries") else c] for n, c in found]
    refuse(server, bundle, packed(entry, keys), UntrustedEntryError, "missing")
    swapped = [list(each) for each in found]
    one, two = (signature_in(content) for _, content in found[:2])
    swapped[0][1] = with_signature(found[0][1], Kind.ENTRY, two)
    swapped[1][1] = with_signature(found[1][1], Kind.ENTRY, one)
    refuse(server, bundle, packed(swapped, keys), UntrustedEntryError, "something else")
    ((record, signature),) = decode_signed(found[2][1], key("t"))
    coded = TargetRecord(graph_hash=record.graph_hash, sources=(), code=(("12" * 32, b"code"),))
    for records, signatures in (([record], []), ([coded], [signature])):
        wrong = [list(each) for each in found]
        wrong[2][1] = encode_target(key("t"), records, signatures)
        refuse(server, bundle, packed(wrong, keys), UntrustedEntryError)
    elsewhere = TargetRecord(graph_hash=key("c"), sources=())
    from stitchcache.artifact.entry import packed_digest

    its = keys.sign("target", key("t"), packed_digest(elsewhere))
    wrong[2][1] = encode_target(key("t"), [elsewhere], [its])
    refuse(server, bundle, packed(wrong, keys), EntryFormatError, "is not there")


def test_an_entry_that_would_be_stored_as_other_bytes_is_refused(server, bundle, tmp_path):
    """The same record in longer msgpack: its signature would be good here, and bad at every start."""
    found, keys = members(bundle.read_bytes()), Keys(str(tmp_path / "ci"))
    _, head, payload = open_frame(found[0][1], Kind.ENTRY)
    assert payload[0] & 0xF0 == 0x80
    payload = b"\xde\x00" + bytes([payload[0] & 0x0F]) + payload[1:]
    bare = seal(Kind.ENTRY, head, payload)
    graph_hash = found[0][0].split("/")[-1].removesuffix(".stitch")
    found[0][1] = with_signature(bare, Kind.ENTRY, keys.sign("entry", graph_hash, bare[-32:].hex()))
    refuse(server, bundle, packed(found, keys), match="stitchcache writes")


def test_the_signature_of_another_bundle_or_use_does_not_count(server, bundle, tmp_path):
    keys = Keys(str(tmp_path / "ci"))
    data = bundle.read_bytes()
    body = data[: data.rindex(b"signature\0")]
    digest = hashlib.sha256(body).hexdigest()
    for kind, about in (("entry", digest), ("bundle", "00" * 32)):
        signature = keys.sign(kind, about, about)
        end = header("signature", len(signature)) + signature + bytes(-len(signature) % 512 + 1024)
        refuse(server, bundle, body + end, UntrustedEntryError, "something else")


def test_a_file_that_grows_or_is_no_bundle_is_refused(server, bundle, tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        import_bundle(server, tmp_path / "none")
    with pytest.raises((StoreError, EntryFormatError)):
        import_bundle(server, tmp_path)
    for data in (b"", b"\0" * 10240, b"PK\3\4" + bytes(2000), os.urandom(4096)):
        refuse(server, bundle, data)
    huge = bytearray(header("blobs/aa/" + "aa" * 32, 0))
    huge[124:136] = b"77777777777\0"
    huge[148:156] = b" " * 8
    huge[148:156] = b"%06o\0 " % sum(huge)
    refuse(server, bundle, bytes(huge) + bytes(1024))


def test_load_takes_a_bundle_with_one_entry(builder, tmp_path, monkeypatch):
    import torch

    import stitchcache

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).eval()
    cache = Cache(tmp_path / "one")
    compiled = stitchcache.compile(model, (torch.ones(2, 4),), backend="eager", cache=cache)
    export_bundle(cache, tmp_path / "one.bundle")
    fresh = Cache(tmp_path / "other")
    loaded = stitchcache.load(tmp_path / "one.bundle", model, cache=fresh)
    assert loaded.graph_hash == compiled.graph_hash
    again = stitchcache.compile(model, (torch.ones(2, 4),), backend="eager", cache=Cache(tmp_path / "other"))
    assert again.cache_hit == "direct"
    export_bundle(builder, tmp_path / "two.bundle")
    with pytest.raises(OptionError, match="2 entries"):
        stitchcache.load(tmp_path / "two.bundle", model, cache=fresh)
