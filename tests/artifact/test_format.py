"""The entry format: round trips, strictness, and damage that is seen before anything is decoded."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import re
import resource
import struct
import typing
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings, strategies as st

from stitchcache import types
from stitchcache.artifact.entry import (
    MAGIC,
    MOST_RECORDS,
    PRELUDE,
    Kind,
    PieceRecord,
    decode,
    decode_factors,
    decode_piece,
    decode_signed,
    decode_target,
    encode,
    encode_piece,
    encode_target,
    header_of,
    open_frame,
    pack_factors,
    seal,
    unpack_factors,
)
from stitchcache.errors import EntryDamagedError, EntryFormatError, FutureFormatError
from stitchcache.store import Files, upkeep
from stitchcache.store.root import Root
from stitchcache.types import Artifact, Variant


def read_header(path):
    root = Root("", files=Files(), durable=False, read_only=True)
    return upkeep.read_header(root, str(path))


GOLDEN = Path(__file__).parent.parent / "data" / "golden"

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
text = st.text(max_size=8)
counts = st.integers(0, (1 << 63) - 1)
lengths = st.integers(0, 1 << 20)
times = st.floats(0, 250e9)
amounts = st.floats(0, allow_infinity=False, allow_nan=False)
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
    output_spec=st.none() | st.builds(types.OutputSpec, tree=text, count=lengths, mutations=tuples(text)),
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
    check=st.none()
    | st.builds(
        types.CheckRecord,
        state=st.sampled_from(["compared", "unchecked"]),
        reason=text,
        bounds=tuples(st.builds(types.OutputBound, name=text, difference=amounts, magnitude=amounts)),
    ),
    created=times,
    label=text,
    compile_seconds=times,
    format_version=st.just(4),
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
@given(st.lists(targets, min_size=1, max_size=MOST_RECORDS), digests, pieces)
def test_targets_and_pieces_survive(records, key, piece):
    data = encode_target(key, records)
    assert decode_target(data, key) == tuple(records)
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
        check=types.CheckRecord(
            state="compared", bounds=(types.OutputBound(name="", difference=0.0, magnitude=1.0),)
        ),
    )
    _, header, payload = open_frame(encode(whole), Kind.ENTRY)
    keys(msgpack.unpackb(header))
    keys(msgpack.unpackb(payload))
    record = types.TargetRecord(
        graph_hash="ab" * 32, sources=(types.SourceRef(module="", digest="", size=0),)
    )
    keys(msgpack.unpackb(open_frame(encode_target("ab" * 32, [record]), Kind.TARGET)[2]))
    known = {**vars(types), "Variant": Variant}
    todo, seen = [Artifact, types.TargetRecord], set()
    while todo:
        kind = todo.pop()
        seen.add(kind)
        missing = {field.name for field in dataclasses.fields(kind)} - written - {"format_version"}
        assert not missing, (kind, missing)
        named = re.findall(r"\w+", " ".join(kind.__annotations__.values()))
        todo += [known[name] for name in named if dataclasses.is_dataclass(known.get(name))]
    assert {types.TensorSpec, types.OutputBound, types.SourceRef, types.SizeRange} < seen
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
    monkeypatch.setattr("stitchcache.artifact.msgpack.unpackb", lambda *a, **k: decoded.append(1))
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


def test_factors_alone_are_read_and_checked():
    factors = tuple(
        types.Factor(name=name, value="1", digest="2") for name in ("env.cpu", "input.x", "torch.y")
    )
    made = dataclasses.replace(small(), factors=factors)
    data, key = encode(made), made.graph_hash
    assert decode_factors(data, key, "", ("env.", "torch.")) == (made.label, (factors[0], factors[2]))
    assert decode_factors(data, key, "", ("none.",)) == (made.label, ())
    with pytest.raises(EntryFormatError):
        decode_factors(data[:-40] + bytes(40), key, "", ("env.",))
    with pytest.raises(EntryFormatError, match="should be about"):
        decode_factors(data, "ab" * 32, "", ("env.",))
    _, header, payload = open_frame(data, Kind.ENTRY)
    value = msgpack.unpackb(payload)
    for wrong in (None, [{"name": "env.cpu"}], {}, ["input.x"], [{"name": 1}], [[]], [{}]):
        damaged = seal(Kind.ENTRY, header, msgpack.packb({**value, "factors": wrong}))
        with pytest.raises(EntryFormatError, match="factors"):
            decode_factors(damaged, key, "", ("env.",))


def test_the_header_alone_says_what_the_whole_says(tmp_path):
    artifact = small()
    data = encode(artifact)
    (tmp_path / "entry").write_bytes(data)
    path = str(tmp_path / "entry")
    place = {"path": path, "file_bytes": len(data), "last_used": os.stat(path).st_mtime}
    assert read_header(path) == header_of(artifact, **place)
    many = tuple(
        types.PieceRef(name="", key="", backend="", blob=types.BlobRef(digest=f"{i:064x}", size=i))
        for i in range(200)
    )
    large = dataclasses.replace(artifact, variants=(dataclasses.replace(artifact.variants[0], pieces=many),))
    (tmp_path / "entry").write_bytes(encode(large))
    assert read_header(path).blobs == large.blobs


def sealed_again(data: bytes, version: int = 4) -> bytes:
    body = bytearray(data[:-32])
    struct.pack_into("<H", body, 8, version)
    end = PRELUDE.size + 32 + PRELUDE.unpack_from(data)[3]
    body[PRELUDE.size : PRELUDE.size + 32] = hashlib.sha256(
        bytes(body[: PRELUDE.size]) + body[64:end]
    ).digest()
    return bytes(body) + hashlib.sha256(body).digest()


def test_a_future_format_is_told_from_damage(tmp_path):
    data = sealed_again(encode(small()), version=5)
    with pytest.raises(FutureFormatError) as caught:
        decode(data, path="some/file")
    assert caught.value.version == 5
    assert "some/file" in str(caught.value)
    (tmp_path / "entry").write_bytes(data)
    with pytest.raises(FutureFormatError):
        read_header(tmp_path / "entry")
    with pytest.raises(EntryDamagedError):
        decode(data[:-1] + b"?")


def resealed(change) -> bytes:
    _, *parts = open_frame(encode(small()), Kind.ENTRY)
    header, payload = map(msgpack.unpackb, parts)
    change(header, payload)
    return seal(Kind.ENTRY, msgpack.packb(header), msgpack.packb(payload))


LEAF = {
    "path": "x",
    "kind": "tensor",
    "tensor": {"dtype": "f", "device": "cpu", "shape": [], "stride": []},
    "symbol": None,
    "value": None,
}


def with_input(**changes):
    spec = {"tree": "", "leaves": [], "symbols": [], "constraints": []}
    return lambda header, payload: payload.update(input_spec=spec | changes)


def with_leaf(**changes):
    return with_input(leaves=[LEAF | {"tensor": LEAF["tensor"] | changes}])


def with_bound(**changes):
    bound = {"name": "", "difference": 0.0, "magnitude": 0.0} | changes
    check = {"state": "compared", "reason": "", "bounds": [bound]}
    return lambda header, payload: payload.update(check=check)


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
    "variants[0].pieces[0].name": lambda h, p: p["variants"][0]["pieces"][0].update(name="x" * 65_537),
    "variants[0].pieces[0].blob.size ": lambda h, p: p["variants"][0]["pieces"][0]["blob"].update(
        size=1 << 63
    ),
    "output_spec.count": lambda h, p: p.update(output_spec={"tree": "", "count": 10**9, "mutations": []}),
    "input_spec.constraints[1]": with_input(constraints=["s0 <= 2", "s0 < 9**" + "9" * 21]),
    "input_spec.constraints[0]": with_input(constraints=["s0+" * 6000]),
    "input_spec.leaves[0].tensor.shape[1]": with_leaf(shape=[1, "s0*" + "1" * 21], stride=[1, 1]),
    "input_spec.leaves[0].tensor.stride[0]": with_leaf(shape=[1], stride=[1 << 63]),
    "input_spec.leaves[0].tensor.shape": with_leaf(shape=[1] * 65, stride=[1] * 65),
    "input_spec.leaves[0].tensor.stride": with_leaf(shape=[1, 2], stride=[1]),
    "input_spec.leaves[0].tensor": with_input(leaves=[LEAF | {"tensor": None}]),
    "input_spec.leaves[0].kind": with_input(leaves=[LEAF | {"kind": "other"}]),
    "input_spec.leaves[0].value": with_input(leaves=[LEAF | {"value": [1]}]),
    "input_spec.leaves[0].value.int": with_input(leaves=[LEAF | {"value": {"int": "0x" + "f" * 20_000}}]),
    "input_spec.leaves[0].value.int ": with_input(leaves=[LEAF | {"value": {"int": "spam"}}]),
    "input_spec.leaves[0].value.'also'": with_input(leaves=[LEAF | {"value": {"int": "1", "also": 1}}]),
    "check.state": lambda h, p: p.update(check={"state": "fine", "reason": "", "bounds": []}),
    "check.bounds[0].difference": with_bound(difference=float("inf")),
    "check.bounds[0].magnitude": with_bound(magnitude=-1.0),
    "check.bounds[0].name": with_bound(name=7),
    "header.compile_seconds": lambda h, p: h.update(compile_seconds=1e300),
    "header.variants": lambda h, p: h.update(variants=1 << 40),
    "header.blobs[0].digest": lambda h, p: h["blobs"][0].update(digest="x"),
    "header ": lambda h, p: h.update(backends=["eager"]),
    "header.graph_hash": lambda h, p: h.update(graph_hash="../../etc/passwd"),
    "header.created": lambda h, p: h.update(created=float("nan")),
    "header.pieces": lambda h, p: h.update(pieces=True),
    "header": lambda h, p: h.update(pieces=2),
}


@pytest.mark.parametrize("field", list(BAD))
def test_errors_say_where(field):
    with pytest.raises(EntryFormatError) as caught:
        decode(resealed(BAD[field]), path="some/file")
    assert caught.value.field == field.rstrip()
    assert "some/file" in str(caught.value)


ODD = [
    None, True, -1, 1 << 63, -(1 << 63), 1.5, float("nan"), float("inf"), 1e300, "", "x" * 70_000, "9" * 30,
    "2**9999999", "\ud800", "ab" * 32, b"", b"\xff", [], {}, [1], {"a": 1}, [[]] * 5, {"int": "zz"},
]  # fmt: skip


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_in_any_place_is_read_or_refused_with_its_path(data):
    name = data.draw(st.sampled_from(sorted(path.name for path in GOLDEN.glob("2e*.stitch"))))
    _, *parts = open_frame((GOLDEN / name).read_bytes(), Kind.ENTRY)
    header, payload = (msgpack.unpackb(part, unicode_errors="surrogatepass") for part in parts)
    for _ in range(data.draw(st.integers(1, 2))):
        changed = data.draw(st.sampled_from([header, payload, payload]))
        path = data.draw(st.sampled_from(list(places(changed))[1:]))
        owner = changed
        for step in path[:-1]:
            owner = owner[step]
        owner[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    packed = (msgpack.packb(part, unicode_errors="surrogatepass") for part in (header, payload))
    refusal = None
    try:
        decode(seal(Kind.ENTRY, *packed), path="some/file")
    except EntryFormatError as error:
        refusal = error
    assert refusal is None or (refusal.field and refusal.path == "some/file")


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
    _, header, _ = open_frame(encode(small()), Kind.ENTRY)
    with pytest.raises(EntryFormatError):
        decode(seal(Kind.ENTRY, header, payload))


def test_sizes_are_checked_before_anything_is_allocated():
    for sizes in [(0xFFFFFFFF, 0, 0), (0, 1 << 62, 0), (0, 0, 0xFFFFFFFF), (1, 0, 0)]:
        body = PRELUDE.pack(MAGIC, 3, 1, *sizes, 0) + b"\0" * 32
        with pytest.raises(EntryFormatError):
            decode(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    "payload",
    [b"\xdc\0\x10" + (b"\xdd\0\x10\0\0" + b"\x90" * (1 << 20)) * 16,
     b"\xdc\0\x10" + (b"\xdd\0\x10\0\0" + b"\xc0" * (1 << 20)) * 16,
     b"\xdd\0\x20\0\0" + b"\xc0" * (1 << 21), (b"\xdd\0\x10\0\0" * 900) + b"\xc0" * (1 << 20)],
    ids=["empty arrays", "nils", "a long array", "claims in claims"],
)  # fmt: skip
def test_few_bytes_cannot_fill_the_memory(payload):
    """Whoever writes a file can give it a right digest; 16 MB of one may be a gigabyte of objects."""
    pid = os.fork()
    if pid == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        try:
            decode_target(seal(Kind.TARGET, b"", payload), "ab" * 32)
        except EntryFormatError:
            os._exit(0)
        except BaseException:  # noqa: BLE001 - told by the status
            os._exit(1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_kinds_are_not_confused():
    target = encode_target("ab" * 32, [types.TargetRecord(graph_hash="ab" * 32, sources=())])
    with pytest.raises(EntryFormatError, match="kind"):
        decode(target)
    with pytest.raises(EntryFormatError, match="kind"):
        decode_target(encode(small()), "ab" * 32)
    with pytest.raises(EntryFormatError) as caught:
        decode_target(target, "cd" * 32)
    assert caught.value.field == "key"


def test_bytes_that_are_reserved_for_signatures_are_passed_over(tmp_path):
    """No version writes any; an older one could."""
    _, header, payload = open_frame(encode(small()), Kind.ENTRY)
    fields = msgpack.unpackb(payload)
    del fields["check"]
    payload = msgpack.packb(fields)
    for size in (1, 100, 4096):
        prelude = PRELUDE.pack(MAGIC, 3, 1, len(header), len(payload), size, 0)
        body = prelude + hashlib.sha256(prelude + header).digest() + header + payload + b"s" * size
        data = body + hashlib.sha256(body).digest()
        assert decode(data) == dataclasses.replace(small(), format_version=3)
        (tmp_path / "entry").write_bytes(data)
        assert read_header(tmp_path / "entry").format_version == 3
    prelude = PRELUDE.pack(MAGIC, 3, 1, 0, 0, 4097, 0)
    body = prelude + hashlib.sha256(prelude).digest() + b"\0" * 4097
    with pytest.raises(EntryFormatError, match="4097 is more than"):
        decode(body + hashlib.sha256(body).digest())


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
        if artifact.format_version == 4:
            assert encode(artifact) == data, (
                "writing the same artifact gives other bytes: raise the format version"
            )
        assert decode(encode(artifact)) == dataclasses.replace(artifact, format_version=4)
    versions = [decode(path.read_bytes()).format_version for path in paths]
    assert sorted(versions) == [3, 3, 4]


FACTORS = (
    types.Factor(name="env.torch", value="2.13.0", digest="ab" * 32),
    types.Factor(name="model.class", value="mylib.Model \ud800", digest="cd" * 32),
)


def test_golden_targets_still_load():
    """Version 3 had neither factors nor a reason, 4 no code objects, and until 5 there was one record."""
    key, source = "3a" * 32, types.SourceRef(module="mylib.layers", digest="cd" * 32, size=77)
    (old,) = decode_target((GOLDEN / "targets" / f"{key}.v3").read_bytes(), key)
    assert (old.graph_hash, old.label, old.created) == ("ef" * 32, "Model", 1_700_000_000.0)
    assert old.sources[1] == source
    assert old.globals == (("env:FLAG", "1"), ("mylib.model:SCALE", "2" * 64))
    assert (old.refused, old.factors, unpack_factors(old.factors), old.code) == (None, b"", (), ())
    (explained,) = decode_target((GOLDEN / "targets" / f"{key}.v4").read_bytes(), key)
    assert explained == dataclasses.replace(old, refused="it reads a clock", factors=pack_factors(FACTORS))
    assert unpack_factors(explained.factors) == FACTORS
    (coded,) = decode_target((GOLDEN / "targets" / f"{key}.v5").read_bytes(), key)
    assert coded == dataclasses.replace(explained, refused=None, code=(("12" * 32, b"\xe3code"),))
    data = (GOLDEN / "targets" / f"{key}.v6").read_bytes()
    assert decode_signed(data, key) == ((coded, b""), (explained, b""))
    data = (GOLDEN / "targets" / f"{key}.v7").read_bytes()
    assert decode_signed(data, key) == ((coded, b"signature"), (explained, b""))
    assert encode_target(key, [coded, explained], [b"signature", b""]) == data, (
        "writing the same target gives other bytes: raise the format version"
    )
    for version in (3, 4, 5, 6, 7):
        data = (GOLDEN / "targets" / f"{key}.v{version}").read_bytes()
        with pytest.raises(EntryFormatError) as other:
            decode_target(data, "4b" * 32)
        assert other.value.field == "key"


def test_a_target_of_another_version_is_neither_guessed_nor_damaged():
    key = "3a" * 32
    read = {v: (GOLDEN / "targets" / f"{key}.v{v}").read_bytes() for v in (3, 4, 5, 6, 7)}
    for data, version, field in (
        (read[3], 4, "refused"),
        (read[4], 5, "code"),
        (read[5], 6, "records"),
        (read[6], 7, "signatures"),
    ):
        with pytest.raises(EntryFormatError) as missing:
            decode_target(sealed_again(data, version=version), key)
        assert missing.value.field == field
    for data, version in ((read[5], 4), (read[5], 3)):
        with pytest.raises(EntryFormatError, match="unknown key"):
            decode_target(sealed_again(data, version=version), key)
    with pytest.raises(EntryFormatError):
        decode_target(sealed_again(read[6], version=5), key)
    with pytest.raises(FutureFormatError):
        decode_target(sealed_again(read[7], version=8), key)


def test_a_target_has_at_least_one_record_and_no_more_than_allowed():
    record = types.TargetRecord(graph_hash="ab" * 32, sources=())
    for number in (0, MOST_RECORDS + 1):
        with pytest.raises(EntryFormatError) as caught:
            decode_target(encode_target("ab" * 32, [record] * number), "ab" * 32)
        assert caught.value.field == "records"


def test_factors_are_only_decoded_when_they_are_asked_for():
    for bad in (
        b"\xc1",
        msgpack.packb({"a": 1}),
        msgpack.packb([["a", "b"]]),
        msgpack.packb([["a", "b", 1]]),
    ):
        record = types.TargetRecord(graph_hash="ab" * 32, sources=(), factors=bad)
        assert decode_target(encode_target("ab" * 32, [record]), "ab" * 32) == (record,)
        with pytest.raises(EntryFormatError):
            unpack_factors(bad)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_junk_is_refused(data):
    with pytest.raises(EntryFormatError):
        decode(data)
