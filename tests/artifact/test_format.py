"""The entry format: round trips, strictness, and damage that is seen before anything is decoded."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import typing
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitchcache import types
from stitchcache.artifact import decode as decode_module
from stitchcache.artifact.decode import (
    decode,
    decode_piece,
    decode_target,
    header_of,
    read_header,
    signed_bytes,
)
from stitchcache.artifact.encode import encode, encode_piece, encode_target
from stitchcache.artifact.factors import pack_factors, raw_entry_factors, unpack_factors
from stitchcache.artifact.frame import MAGIC, PRELUDE, Kind, open_frame, seal
from stitchcache.artifact.record import Artifact, PieceRecord, Variant
from stitchcache.errors import EntryDamagedError, EntryFormatError, FutureFormatError

GOLDEN = Path(__file__).parent.parent / "data" / "golden"

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
text = st.text(max_size=8)
counts = st.integers(0, 1 << 62)
times = st.floats(0, 1e12)
blobs = st.builds(types.BlobRef, digest=digests, size=counts)
sizes = st.one_of(counts, text)


@st.composite
def tensors(draw):
    rank = draw(st.integers(0, 3))
    dims = st.lists(sizes, min_size=rank, max_size=rank).map(tuple)
    return types.TensorSpec(dtype=draw(text), device=draw(text), shape=draw(dims), stride=draw(dims))


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), text)
leaves = st.one_of(
    st.builds(types.LeafSpec, path=text, kind=st.just("tensor"), tensor=tensors()),
    st.builds(types.LeafSpec, path=text, kind=st.just("symbol"), symbol=text),
    st.builds(types.LeafSpec, path=text, kind=st.just("constant"), value=scalars),
)
symbols = st.builds(
    types.SymbolSpec, name=text, min=st.integers(-9, 9), max=st.none() | st.integers(0, 1 << 62), label=text
)


def tuples(strategy, most=3):
    return st.lists(strategy, max_size=most).map(tuple)


ranges = st.tuples(counts, counts, st.none() | text).map(
    lambda r: types.SizeRange(min(r[:2]), max(r[:2]), r[2])
)
pieces = st.builds(types.PieceRef, name=text, key=text, backend=text, blob=blobs)
variants = st.builds(
    Variant,
    size_range=st.none() | ranges,
    code=text,
    submod_names=tuples(text),
    consts=st.none() | st.binary(max_size=20),
    pieces=tuples(pieces),
)
artifacts = st.builds(
    Artifact,
    graph_hash=digests,
    variants=st.lists(variants, min_size=1, max_size=2).map(tuple),
    input_spec=st.none()
    | st.builds(
        types.InputSpec, tree=text, leaves=tuples(leaves), symbols=tuples(symbols), constraints=tuples(text)
    ),
    output_spec=st.none() | st.builds(types.OutputSpec, tree=text, count=counts, mutations=tuples(text)),
    bindings=tuples(
        st.builds(
            types.BindingSpec,
            name=text,
            kind=st.sampled_from(["parameter", "buffer", "constant"]),
            tensor=tensors(),
            blob=st.none() | blobs,
            aliases=tuples(text),
        )
    ),
    factors=tuples(st.builds(types.Factor, name=text, value=text, digest=digests)),
    created=times,
    label=text,
    compile_seconds=times,
    format_version=st.just(3),
)
targets = st.builds(
    types.TargetRecord,
    graph_hash=digests,
    sources=tuples(st.builds(types.SourceRef, module=text, digest=digests, size=counts)),
    globals=tuples(st.tuples(text, text)),
    label=text,
    created=times,
    refused=st.none() | text,
    factors=tuples(st.builds(types.Factor, name=text, value=text, digest=digests)).map(pack_factors),
)


def small() -> Artifact:
    blob = types.BlobRef(digest="ab" * 32, size=7)
    piece = types.PieceRef(name="submod_0", key="cd" * 32, backend="aoti", blob=blob)
    variant = Variant(size_range=None, code="x", submod_names=("submod_0",), consts=b"\x80", pieces=(piece,))
    return Artifact(graph_hash="ef" * 32, variants=(variant,), created=2.0, label="Model")


@settings(max_examples=150, deadline=None)
@given(artifacts)
def test_an_artifact_survives(artifact):
    data = encode(artifact)
    assert decode(data) == artifact
    assert encode(artifact) == data


@settings(max_examples=50, deadline=None)
@given(targets, digests, pieces)
def test_targets_and_pieces_survive(target, key, piece):
    assert decode_target(encode_target(key, target), key) == target
    record = PieceRecord(key=key, backend=piece.backend, blob=piece.blob)
    assert decode_piece(encode_piece(record), key) == record


def test_no_field_of_a_record_is_forgotten():
    """A field that a record gains and the codec does not know would be lost without a word."""
    written: set[str] = set()

    def keys(value):
        if isinstance(value, dict):
            written.update(value)
            for each in value.values():
                keys(each)
        elif isinstance(value, list):
            for each in value:
                keys(each)

    tensor = types.TensorSpec(dtype="f", device="cpu", shape=(), stride=())
    blob = types.BlobRef(digest="ab" * 32, size=7)
    whole = dataclasses.replace(
        small(),
        variants=(dataclasses.replace(small().variants[0], size_range=types.SizeRange(1, 2, "b")),),
        input_spec=types.InputSpec(
            tree="",
            leaves=(types.LeafSpec(path="", kind="constant"),),
            symbols=(types.SymbolSpec(name="", min=0, max=1),),
        ),
        output_spec=types.OutputSpec(tree="", count=0),
        bindings=(types.BindingSpec(name="", kind="buffer", tensor=tensor, blob=blob),),
        factors=(types.Factor(name="", value="", digest=""),),
    )
    frame = open_frame(encode(whole), Kind.ENTRY)
    keys(msgpack.unpackb(frame.header))
    keys(msgpack.unpackb(frame.payload))
    record = types.TargetRecord(
        graph_hash="ab" * 32, sources=(types.SourceRef(module="", digest="", size=0),)
    )
    keys(msgpack.unpackb(open_frame(encode_target("k", record), Kind.TARGET).payload))
    for kind in [Artifact, Variant, *vars(types).values()]:
        if dataclasses.is_dataclass(kind):
            missing = {field.name for field in dataclasses.fields(kind)} - written - {"format_version"}
            assert not missing, (kind, missing)
    assert typing.get_type_hints(Artifact)


def test_special_values_survive():
    values = [float("inf"), -0.0, 10**40, -(10**40), (1 << 64) - 1, -(1 << 63), True, "\ud800 lone", None]
    leaves = tuple(
        types.LeafSpec(path=str(i), kind="constant", value=value) for i, value in enumerate(values)
    )
    artifact = dataclasses.replace(small(), input_spec=types.InputSpec(tree="", leaves=leaves))
    found = decode(encode(artifact)).input_spec.leaves
    assert [(type(leaf.value), repr(leaf.value)) for leaf in found] == [(type(v), repr(v)) for v in values]


def test_every_bit_flip_and_truncation_is_seen_before_decoding(monkeypatch):
    data = encode(small())
    decoded = []
    real = decode_module.unpack
    monkeypatch.setattr(decode_module, "unpack", lambda *a, **k: decoded.append(1) or real(*a, **k))
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EntryDamagedError):
            decode(bytes(changed))
    for size in range(len(data)):
        with pytest.raises(EntryDamagedError):
            decode(data[:size])
    for extra in (b"\0", b"x" * 40):
        with pytest.raises(EntryDamagedError):
            decode(data + extra)
    assert not decoded


def test_every_bit_flip_in_what_ls_reads_is_seen(tmp_path):
    data = encode(small())
    header_end = PRELUDE.size + 32 + PRELUDE.unpack_from(data)[3]
    path = tmp_path / "entry"
    for bit in range(header_end * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(EntryFormatError):
            read_header(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(EntryFormatError):
            read_header(path)


def test_the_header_alone_says_what_the_whole_says(tmp_path):
    artifact = small()
    data = encode(artifact)
    (tmp_path / "entry").write_bytes(data)
    path = str(tmp_path / "entry")
    assert read_header(path) == header_of(artifact, path=path, file_bytes=len(data))
    many = tuple(
        types.PieceRef(name="", key="", backend="", blob=types.BlobRef(digest=f"{i:064x}", size=i))
        for i in range(200)
    )
    large = dataclasses.replace(artifact, variants=(dataclasses.replace(artifact.variants[0], pieces=many),))
    (tmp_path / "entry").write_bytes(encode(large))
    assert read_header(path).blobs == large.blobs


def sealed_again(data: bytes, version: int = 3) -> bytes:
    body = bytearray(data[:-32])
    struct.pack_into("<H", body, 8, version)
    end = PRELUDE.size + 32 + PRELUDE.unpack_from(data)[3]
    body[PRELUDE.size : PRELUDE.size + 32] = hashlib.sha256(
        bytes(body[: PRELUDE.size]) + body[64:end]
    ).digest()
    return bytes(body) + hashlib.sha256(body).digest()


def test_a_future_format_is_told_from_damage(tmp_path):
    data = sealed_again(encode(small()), version=4)
    with pytest.raises(FutureFormatError) as caught:
        decode(data, path="some/file")
    assert caught.value.version == 4
    assert "some/file" in str(caught.value)
    (tmp_path / "entry").write_bytes(data)
    with pytest.raises(FutureFormatError):
        read_header(tmp_path / "entry")
    with pytest.raises(EntryDamagedError):
        decode(data[:-1] + b"?")


def resealed(change) -> bytes:
    frame = open_frame(encode(small()), Kind.ENTRY)
    header, payload = msgpack.unpackb(frame.header), msgpack.unpackb(frame.payload)
    change(header, payload)
    return seal(Kind.ENTRY, msgpack.packb(header), msgpack.packb(payload))


BAD = {
    "variants[0].pieces[0].blob.digest": lambda h, p: p["variants"][0]["pieces"][0]["blob"].update(
        digest="AB" * 32
    ),
    "variants[0].pieces[0].blob.size": lambda h, p: p["variants"][0]["pieces"][0]["blob"].update(size=-1),
    "variants[0].code": lambda h, p: p["variants"][0].update(code=b"x"),
    "variants[0].submod_names[0]": lambda h, p: p["variants"][0].update(submod_names=[1]),
    "variants[0].'extra'": lambda h, p: p["variants"][0].update(extra=1),
    "variants[0].consts": lambda h, p: p["variants"][0].pop("consts"),
    "variants[0].size_range.max": lambda h, p: p["variants"][0].update(
        size_range={"min": 2, "max": 1, "dim": None}
    ),
    "variants": lambda h, p: p.update(variants=[]),
    "factors": lambda h, p: p.update(factors={}),
    "input_spec": lambda h, p: p.update(input_spec=True),
    "header.graph_hash": lambda h, p: h.update(graph_hash="../../etc/passwd"),
    "header.created": lambda h, p: h.update(created=float("nan")),
    "header.pieces": lambda h, p: h.update(pieces=True),
    "header": lambda h, p: h.update(pieces=2),
}


@pytest.mark.parametrize("field", list(BAD))
def test_errors_say_where(field):
    with pytest.raises(EntryFormatError) as caught:
        decode(resealed(BAD[field]), path="some/file")
    assert caught.value.field == field
    assert "some/file" in str(caught.value)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x81\xa1a\x01\x00",
        b"\x82\xa1a\x01\xa1a\x01",
        b"\xd4\x01x",
        b"\x81\x01\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xc6\xff\xff\xff\xff",
        b"\xd7\xff" + b"\0" * 8,
        b"\xa1\xff",
    ],
)
def test_hostile_msgpack_is_refused(payload):
    header = open_frame(encode(small()), Kind.ENTRY).header
    with pytest.raises(EntryFormatError):
        decode(seal(Kind.ENTRY, header, payload))


def test_sizes_are_checked_before_anything_is_allocated():
    for sizes in [(0xFFFFFFFF, 0, 0), (0, 1 << 62, 0), (0, 0, 0xFFFFFFFF), (1, 0, 0)]:
        body = PRELUDE.pack(MAGIC, 3, 1, *sizes, 0) + b"\0" * 32
        with pytest.raises(EntryFormatError):
            decode(body + hashlib.sha256(body).digest())


def test_kinds_are_not_confused():
    target = encode_target("ab" * 32, types.TargetRecord(graph_hash="ab" * 32, sources=()))
    with pytest.raises(EntryFormatError, match="kind"):
        decode(target)
    with pytest.raises(EntryFormatError, match="kind"):
        decode_target(encode(small()), "ab" * 32)
    with pytest.raises(EntryFormatError) as caught:
        decode_target(target, "cd" * 32)
    assert caught.value.field == "key"


def test_a_signature_has_room_and_covers_header_and_payload():
    plain, signed = encode(small()), encode(small(), signature=b"s" * 100)
    assert decode(signed) == decode(plain) == small()
    assert signed_bytes(signed) == (signed_bytes(plain)[0], b"s" * 100)
    other = encode(dataclasses.replace(small(), label="Other"))
    assert signed_bytes(other)[0] != signed_bytes(plain)[0]
    with pytest.raises(EntryFormatError):
        encode(small(), signature=b"s" * 5000)


def test_what_has_no_form_is_refused():
    for change in ({"label": object()}, {"created": float("inf")}):
        bad = dataclasses.replace(small(), **change)
        with pytest.raises(EntryFormatError):
            decode(encode(bad))


def test_golden_entries_still_load():
    paths = sorted(GOLDEN.glob("*.stitch"))
    assert paths
    for path in paths:
        data = path.read_bytes()
        artifact = decode(data, path=str(path))
        assert artifact.graph_hash == path.stem
        assert encode(artifact) == data, (
            "writing the same artifact gives other bytes: raise the format version"
        )


FACTORS = (
    types.Factor(name="env.torch", value="2.13.0", digest="ab" * 32),
    types.Factor(name="model.class", value="mylib.Model \ud800", digest="cd" * 32),
)


def test_golden_targets_still_load():
    """Version 3 had neither factors nor a reason, version 4 no code objects."""
    key, source = "3a" * 32, types.SourceRef(module="mylib.layers", digest="cd" * 32, size=77)
    old = decode_target((GOLDEN / "targets" / f"{key}.v3").read_bytes(), key)
    assert (old.graph_hash, old.label, old.created) == ("ef" * 32, "Model", 1_700_000_000.0)
    assert old.sources[1] == source
    assert old.globals == (("env:FLAG", "1"), ("mylib.model:SCALE", "2" * 64))
    assert (old.refused, old.factors, unpack_factors(old.factors), old.code) == (None, b"", (), ())
    explained = decode_target((GOLDEN / "targets" / f"{key}.v4").read_bytes(), key)
    assert explained == dataclasses.replace(old, refused="it reads a clock", factors=pack_factors(FACTORS))
    assert unpack_factors(explained.factors) == FACTORS
    data = (GOLDEN / "targets" / f"{key}.v5").read_bytes()
    new = decode_target(data, key)
    assert new == dataclasses.replace(explained, refused=None, code=(("12" * 32, b"\xe3code"),))
    assert encode_target(key, new) == data, (
        "writing the same target gives other bytes: raise the format version"
    )


def test_a_target_of_another_version_is_neither_guessed_nor_damaged():
    key = "3a" * 32
    old = (GOLDEN / "targets" / f"{key}.v3").read_bytes()
    explained = (GOLDEN / "targets" / f"{key}.v4").read_bytes()
    new = (GOLDEN / "targets" / f"{key}.v5").read_bytes()
    for data, version, field in ((old, 4, "refused"), (explained, 5, "code")):
        with pytest.raises(EntryFormatError) as missing:
            decode_target(sealed_again(data, version=version), key)
        assert missing.value.field == field
    with pytest.raises(EntryFormatError, match="unknown key"):
        decode_target(sealed_again(new, version=4), key)
    with pytest.raises(EntryFormatError, match="unknown key"):
        decode_target(sealed_again(new, version=3), key)
    with pytest.raises(FutureFormatError):
        decode_target(sealed_again(new, version=6), key)


def test_factors_are_only_decoded_when_they_are_asked_for():
    for bad in (
        b"\xc1",
        msgpack.packb({"a": 1}),
        msgpack.packb([["a", "b"]]),
        msgpack.packb([["a", "b", 1]]),
    ):
        record = types.TargetRecord(graph_hash="ab" * 32, sources=(), factors=bad)
        assert decode_target(encode_target("k", record), "k") == record
        with pytest.raises(EntryFormatError):
            unpack_factors(bad)


def test_an_entrys_factors_can_be_read_alone():
    data = encode(dataclasses.replace(small(), factors=FACTORS))
    assert raw_entry_factors(data) == {f.name: (f.value, f.digest) for f in FACTORS}
    assert raw_entry_factors(encode(small())) == {}
    with pytest.raises(EntryDamagedError):
        raw_entry_factors(data[:-1] + b"?")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_junk_is_refused(data):
    with pytest.raises(EntryFormatError):
        decode(data)
