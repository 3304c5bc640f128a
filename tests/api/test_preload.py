"""preload(): what is made ready is used where it fits, and never decides anything."""

from __future__ import annotations

import os
import threading

import models
import pytest
import torch

import stitchcache
from stitchcache import errors


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path / "cache")


def compile_decoder(model=None, **more):
    return stitchcache.compile(model or models.decoder(), (models.ids(),), **models.decoder_options(**more))


def reads(cache, monkeypatch):
    """Graph hashes that compile() itself reads from now on."""
    seen = []
    get = cache.get
    monkeypatch.setattr(cache, "get", lambda graph_hash: seen.append(graph_hash) or get(graph_hash))
    return seen


@pytest.mark.parametrize("by", ["hash", "prefix", "label", "target"])
def test_what_was_named_is_ready(cache, monkeypatch, by):
    first = compile_decoder(cache=cache)
    name = {
        "hash": first.graph_hash,
        "prefix": first.graph_hash[:10],
        "label": first.artifact.label,
        "target": stitchcache.Target(first.artifact.label, tuple),
    }[by]
    preloaded = stitchcache.preload(name, cache=cache)
    assert preloaded.wait(60)
    seen = reads(cache, monkeypatch)
    again = compile_decoder(preloaded=preloaded)
    assert again.cache_hit == "direct"
    assert seen == [], "compile() takes the entry that is ready"
    x = models.ids(3, 5)
    torch.testing.assert_close(again(x), models.decoder()(x))


def test_another_model_gets_its_own_entry(cache):
    """The wrong guess: an entry of the same label, for a model with more layers."""
    few, many = (
        compile_decoder(models.decoder(2), cache=cache),
        compile_decoder(models.decoder(4), cache=cache),
    )
    preloaded = stitchcache.preload(few.graph_hash, cache=cache)
    again = compile_decoder(models.decoder(4), preloaded=preloaded)
    assert (again.cache_hit, again.graph_hash) == ("direct", many.graph_hash)
    x = models.ids(3, 5)
    torch.testing.assert_close(again(x), models.decoder(4)(x))


def test_a_preloaded_entry_is_no_hit_by_itself(cache):
    entry = compile_decoder(cache=cache)
    preloaded = stitchcache.preload(entry.graph_hash, cache=cache)
    with pytest.raises(errors.CacheMissError):
        compile_decoder(preloaded=preloaded, key_factors={"release": 2}, splitting_ops=(), on_miss="error")


def test_a_blob_that_is_damaged_meanwhile_is_noticed(cache, caplog):
    entry = compile_decoder(cache=cache)
    preloaded = stitchcache.preload(entry.graph_hash, cache=cache)
    assert preloaded.wait(60)
    path = cache.blob_path(entry.artifact.blobs[0])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    os.chmod(path, 0o644)
    path.write_bytes(data)
    again = compile_decoder(preloaded=preloaded)
    assert again.cache_hit != "direct"
    assert "damaged" in caplog.text
    x = models.ids(3, 5)
    torch.testing.assert_close(again(x), models.decoder()(x))


@pytest.mark.parametrize("name", [None, "nothing of this name", "0" * 64])
def test_nothing_to_be_found(cache, name):
    preloaded = stitchcache.preload(name, cache=cache)
    assert compile_decoder(preloaded=preloaded).cache_hit is None
    assert compile_decoder(preloaded=preloaded).cache_hit == "direct"


def test_a_root_that_is_no_directory_is_compiles_to_report(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STITCHCACHE_DIR", str(tmp_path / "file"))
    preloaded = stitchcache.preload("any")
    with pytest.raises(errors.StoreError, match="not a directory"):
        compile_decoder(preloaded=preloaded)


def test_two_caches_are_refused(cache, tmp_path):
    preloaded = stitchcache.preload(cache=cache)
    with pytest.raises(errors.OptionError, match="two Cache objects"):
        compile_decoder(preloaded=preloaded, cache=stitchcache.Cache(tmp_path / "other"))


def test_several_compilations_share_one(cache):
    entry = compile_decoder(cache=cache)
    preloaded = stitchcache.preload(entry.graph_hash, cache=cache)
    found = []
    model = models.decoder()
    threads = [
        threading.Thread(target=lambda: found.append(compile_decoder(model, preloaded=preloaded)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    x = models.ids(3, 5)
    for compiled in found:
        assert compiled.cache_hit == "direct"
        torch.testing.assert_close(compiled(x), model(x))
    assert len(found) == 4


def test_before_torch_is_imported(cache, fresh_process):
    """The thread and the program import torch at one time; compiled libraries are loaded by the thread."""
    fresh_process(
        f"""
        import torch, stitchcache
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        stitchcache.compile(model, (torch.ones(2, 4),), cache=stitchcache.Cache({str(cache.root)!r}))
        print("[]")
        """
    )
    entry = fresh_process(
        f"""
        import json, sys, stitchcache
        sys.modules["torch"] = None
        preloaded = stitchcache.preload("Sequential", cache=stitchcache.Cache({str(cache.root)!r}))
        print(json.dumps([preloaded.cache is not None and preloaded._artifact is not None]))
        """
    )
    assert entry == [True], "the entry is read first, which needs no torch"
    result = fresh_process(
        f"""
        import json, stitchcache
        cache = stitchcache.Cache({str(cache.root)!r})
        preloaded = stitchcache.preload("Sequential", cache=cache)
        import torch
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        preloaded.wait()
        taken = []
        from stitchcache import pipeline
        load_piece = pipeline.load_piece
        pipeline.load_piece = lambda name, *rest: taken.append(name) or load_piece(name, *rest)
        compiled = stitchcache.compile(model, (torch.ones(2, 4),), preloaded=preloaded)
        x = torch.randn(2, 4)
        print(json.dumps(dict(hit=compiled.cache_hit, loaded=taken,
                              difference=float((compiled(x) - model(x)).abs().max()))))
        """
    )
    assert result["hit"] == "direct"
    assert result["loaded"] == [], "the library was loaded by the thread"
    assert result["difference"] < 1e-5


def test_a_process_that_ends_meanwhile_ends_the_thread_first(fresh_process):
    """The interpreter would stop it in the middle of an import, or of torch, and may abort on that."""
    threads = fresh_process(
        """
        import atexit, json, threading, stitchcache
        # What is registered first is called last.
        atexit.register(lambda: print(json.dumps([t.name for t in threading.enumerate()])))
        stitchcache.preload("nothing of this name")
        """
    )
    assert threads == ["MainThread"]


def test_a_forked_process_does_without_it(tmp_path, fresh_process):
    result = fresh_process(
        f"""
        import json, os, torch, models, stitchcache
        cache = stitchcache.Cache({str(tmp_path / "cache")!r})
        options = models.decoder_options()
        model, ids = models.decoder(), models.ids()
        first = stitchcache.compile(model, (ids,), cache=cache, **options)
        preloaded = stitchcache.preload(first.graph_hash, cache=cache)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            again = stitchcache.compile(model, (ids,), preloaded=preloaded, **options)
            os.write(writing, (again.cache_hit or "none").encode())
            os._exit(0)
        os.waitpid(child, 0)
        print(json.dumps(dict(hit=os.read(reading, 20).decode())))
        """
    )
    assert result["hit"] == "direct"


def test_a_label_that_nothing_has_is_told(cache, caplog):
    preloaded = stitchcache.preload("nonexistent", cache=cache)
    assert not preloaded.wait(60)
    assert "no usable entry" in caplog.text
    assert "'nonexistent'" in caplog.text
    assert stitchcache.preload(cache=cache).wait(60)
