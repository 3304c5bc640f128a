"""Saved graphs: read back whole, refused when anything is off."""

from __future__ import annotations

import msgpack
import pytest
import torch

import stitchcache
from stitchcache import errors
from stitchcache.runtime.graph import dump_graph, load_blobs, load_graph


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    cache = stitchcache.Cache(tmp_path_factory.mktemp("cache"))
    model = torch.nn.Linear(4, 4).eval()
    artifact = stitchcache.compile(model, (torch.randn(2, 4),), cache=cache, backend="eager").artifact
    blobs = {blob.digest: cache.blob_path(blob).read_bytes() for blob in artifact.blobs}
    return artifact, blobs, [torch.arange(3)]


def test_comes_back_whole(saved):
    artifact, blobs, held = load_graph(dump_graph(*saved))
    assert (artifact, blobs) == saved[:2]
    assert torch.equal(held[0], torch.arange(3))
    assert load_blobs(artifact, blobs).keys() == {piece.key for piece in artifact.pieces}


def changed(saved, **fields):
    return msgpack.packb({**msgpack.unpackb(dump_graph(*saved)), **fields})


def test_bytes_of_another_kind_are_refused(saved):
    for data in (b"", b"\xc1", b"nonsense", changed(saved, magic="other"), changed(saved, entry=None)):
        with pytest.raises(errors.EntryFormatError, match="Compile and save it again"):
            load_graph(data)


def test_damage_is_noticed(saved):
    digest, data = next(iter(saved[1].items()))
    for blobs in ({}, {digest: data[:-1] + b"?"}):
        with pytest.raises(errors.EntryDamagedError, match="missing or damaged"):
            load_graph(changed(saved, blobs=blobs))
    entry = bytearray(msgpack.unpackb(dump_graph(*saved))["entry"])
    entry[len(entry) // 2] ^= 1
    with pytest.raises(errors.EntryFormatError):
        load_graph(changed(saved, entry=bytes(entry)))


def test_every_truncation_is_refused(saved):
    whole = dump_graph(*saved)
    for length in range(0, len(whole), 97):
        with pytest.raises(errors.EntryFormatError):
            load_graph(whole[:length])


def test_pieces_that_run_op_by_op_are_of_the_environment_they_were_made_in(tmp_path):
    """With the default backend, whose factors are not those of eager pieces."""
    cache = stitchcache.Cache(tmp_path)

    class Floats(torch.nn.Module):
        def forward(self, x, factor):
            return x * factor

    torch._dynamo.reset()
    options = {"cache": cache, "backend": "aoti"}
    fast = torch.compile(Floats().eval(), backend="stitchcache", dynamic=True, options=options)
    with torch.no_grad():
        fast(torch.ones(3), 0.5)
    torch._dynamo.reset()
    (header,) = cache.entries()
    artifact = cache.get(header.graph_hash)
    assert {piece.backend for piece in artifact.pieces} == {"eager"}
    blobs = {blob.digest: cache.blob_path(blob).read_bytes() for blob in artifact.blobs}
    assert load_graph(dump_graph(artifact, blobs, []))[0] == artifact
