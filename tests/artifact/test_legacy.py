"""Formats 0, 1 and 2 load for ever, and hostile ones do nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import msgpack
import pytest

from stitchcache.artifact.consts import load_consts
from stitchcache.artifact.entry import decode, decode_header, decode_named, encode
from stitchcache.errors import EntryFormatError

LEGACY = Path(__file__).parent.parent / "data" / "legacy"
CASES = json.loads((LEGACY / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["file"][:8] for case in CASES])
def test_each_loads(case):
    data = (LEGACY / case["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == case["sha256"]
    artifact = decode(data)
    assert (artifact.graph_hash, artifact.format_version) == (case["graph_hash"], case["format"])
    assert (len(artifact.variants), artifact.pieces) == (1, ())
    assert set(case["submods"]) <= set(artifact.submod_names)
    again = decode(encode(artifact))
    assert again.variants == artifact.variants
    assert decode_header((LEGACY / case["file"]).read_bytes(), 1).graph_hash == case["graph_hash"]


def test_the_consts_of_format_2():
    torch = pytest.importorskip("torch")
    case = next(case for case in CASES if "float64" in str(case["expect"]))
    consts = load_consts(decode((LEGACY / case["file"]).read_bytes()).consts)
    assert consts == [torch.device("cpu"), torch.float64, slice(0, 4, 2)]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


HASH = "ab" * 32
HOSTILE_PICKLES = {
    "call": pickle.dumps({"execution_code": Evil()}),
    "global": pickle.dumps({"execution_code": os.path.join}),
    "old call": b"\x80\x02cos\nsystem\n(S'touch evil'\ntR.",
    "memo bomb": b"\x80\x04r\xff\xff\xff\x7f.",
    "truncated": pickle.dumps({"execution_code": "x" * 100})[:-20],
    "trailing": pickle.dumps({"execution_code": "", "submod_names": [], "graph_hash": HASH}) + b"x",
    "not a dict": pickle.dumps([1]),
    "bytes": pickle.dumps({"execution_code": b"x", "submod_names": [], "graph_hash": HASH}),
    "persistent id": b"\x80\x04\x8c\x01aQ.",
    "unhashable key": b"\x80\x04}]K\x01s.",
    "extension": b"\x80\x04\x82\x01.",
    "huge string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("name", list(HOSTILE_PICKLES))
def test_hostile_pickles_do_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EntryFormatError):
        decode_named(HOSTILE_PICKLES[name], HASH, "f.pkl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 3}, "version"),
        ({"version": True}, "version"),
        ({"graph_hash": "AB" * 32}, "graph_hash"),
        ({"code": 1}, "code"),
        ({"submod_names": ["a", 1]}, "submod_names[1]"),
        ({"consts": "text"}, "consts"),
        ({"more": 1}, "'more'"),
    ],
)
def test_malformed_maps_are_refused(change, field):
    record = {"version": 2, "graph_hash": HASH, "code": "", "submod_names": [], "consts": None}
    assert decode(msgpack.packb(record)).graph_hash == HASH
    with pytest.raises(EntryFormatError) as caught:
        decode_named(msgpack.packb(record | change), HASH, "f.msgpack")
    assert caught.value.field == field
