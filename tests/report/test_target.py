"""Every miss is explained: by the model, the log, the error, and the next process."""

from __future__ import annotations

import dataclasses
import hashlib
import logging

import pytest
import torch
from explain_models import Cached, Scaled, cached_three

import stitchcache
from stitchcache.artifact import pack
from stitchcache.artifact.entry import PRELUDE, unpack_factors
from stitchcache.report.target import explain_target


def compiled(cache, model=None, **more):
    options = {"backend": "eager", "cache": cache, **more}
    return stitchcache.compile((model or Scaled()).eval(), (torch.ones(3),), **options)


def target(model=None, **more):
    return stitchcache.Target(
        "t", lambda: ((model or Scaled()).eval(), (torch.ones(3),)), backend="eager", **more
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A cache that holds ``Scaled(2.0)``; tests copy what they change."""
    root = tmp_path_factory.mktemp("explained")
    root.chmod(0o755)
    compiled(stitchcache.Cache(root))
    return root


@pytest.fixture
def cache(root, tmp_path):
    """The same cache under one that the test may write to."""
    return stitchcache.Cache([tmp_path / "top", root])


def target_files(cache):
    return [path for path in (cache.root / "targets").rglob("*") if path.is_file()]


# ---- the record that a compiled model gives


def test_a_direct_hit(cache):
    model = compiled(cache)
    told = model.explain()
    assert isinstance(told, stitchcache.Explanation)
    assert (told.hit, told.reason, told.changed, told.nearest) == ("direct", "", {}, None)
    assert told.graph_hash == model.graph_hash
    assert {"model.class", "env.torch", "input.0.x"} <= {factor.name for factor in told.factors}
    assert cache.get_target(told.target_key)[0].graph_hash == model.graph_hash
    assert told.seconds == model.timings
    assert str(told).startswith(f"Scaled: direct hit {model.graph_hash} in ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.hit = "graph"


def test_a_miss_names_what_differs_from_the_nearest(cache, caplog):
    first = compiled(cache)
    with caplog.at_level(logging.INFO, logger="stitchcache"):
        other = compiled(cache, Scaled(5.0))
    told = other.explain()
    name = "model.attributes.explain_models.Scaled.scale"
    assert (told.hit, told.reason) == (None, "no entry for this target")
    assert told.nearest.graph_hash == first.graph_hash
    assert told.nearest.differences == {name: ("2.0", "5.0")}
    assert f"  {name}: 2.0 -> 5.0" in str(told).splitlines()
    line = caplog.records[-1].message
    assert f"nearest {first.graph_hash[:12]} differs in {name})" in line
    assert compiled(cache, Scaled(5.0)).explain().hit == "direct"


def test_another_class_is_not_compared_in_the_log(cache, caplog):
    with caplog.at_level(logging.INFO, logger="stitchcache"):
        compiled(cache, Cached())
    assert "the newest entries are all of other model classes" in caplog.text


def test_loaded_by_its_graph_hash(cache):
    model = stitchcache.load(compiled(cache).graph_hash, Scaled().eval(), cache=cache)
    told = model.explain()
    assert (told.target_key, told.factors) == (None, ())
    assert "loaded by its graph hash" in str(told)


def test_a_direct_hit_imports_nothing_for_it_until_it_is_asked(tmp_path, fresh_process):
    cache = stitchcache.Cache(tmp_path / "warm")
    compiled(cache, torch.nn.Linear(3, 2))
    answer = fresh_process(
        f"""
        import json, sys, torch, stitchcache
        cache = stitchcache.Cache({str(cache.root)!r})
        model = torch.nn.Linear(3, 2).eval()
        made = stitchcache.compile(model, (torch.ones(3),), backend="eager", cache=cache)
        parts = ["explanation", "pipeline.miss", "pipeline.trace", "report"]
        loaded = [part for part in parts if "stitchcache." + part in sys.modules]
        print(json.dumps([made.cache_hit, loaded, made.explain().hit]))
        """
    )
    assert answer == ["direct", [], "direct"]


# ---- the error


EDITED = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return x * self.rate * {}
"""


def test_the_error_names_factors_and_files_in_a_second_process(tmp_path, fresh_process):
    """Both ways of forbidding a miss; an attribute, and then the source, is another one."""
    source = """
        import json, os, pickle, sys
        sys.path.insert(0, {folder!r})
        import torch, stitchcache, edited
        from stitchcache.errors import CacheMissError
        cache = stitchcache.Cache({cache!r})
        def attempt(scale, **more):
            model = edited.Net().eval()
            model.rate = scale
            try:
                made = stitchcache.compile(model, (torch.ones(3),), backend="eager", cache=cache, **more)
            except CacheMissError as error:
                error = pickle.loads(pickle.dumps(error))
                return dict(message=str(error), differences=error.differences, changed=error.changed)
            return made.cache_hit
        first = attempt(1.0)
        os.environ["STITCHCACHE_REQUIRE"] = {require!r}
        print(json.dumps([first, attempt(7.0, on_miss={on_miss!r})]))
    """
    words = {"folder": str(tmp_path), "cache": str(tmp_path / "c")}
    file = tmp_path / "edited.py"
    file.write_text(EDITED.format(2))
    first, error = fresh_process(source.format(**words, require="0", on_miss="error"))
    assert first is None
    name = "model.attributes.edited.Net.rate"
    assert error["differences"] == {name: ["1.0", "7.0"]}
    assert error["changed"] == {}
    assert f", in {name} (1.0 -> 7.0)" in error["message"]
    old = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(EDITED.format(3))
    new = hashlib.sha256(file.read_bytes()).hexdigest()
    require = "os.environ['STITCHCACHE_REQUIRE'] = '1'; first = attempt(1.0)"
    code = source.format(**words, require="1", on_miss="compile").replace("first = attempt(1.0)", require)
    edited, attribute = fresh_process(code)
    assert edited["changed"] == attribute["changed"] == {str(file): [old, new]}
    assert f"Changed: {file} ({old[:12]} -> {new[:12]})" in edited["message"]
    assert list(edited["differences"]) == ["model.code.edited"]
    assert attribute["differences"][name] == ["1.0", "7.0"]


# ---- refusals are kept


def test_a_refusal_is_stored_and_said_without_tracing(tmp_path, caplog):
    cache = stitchcache.Cache(tmp_path)
    cached_three.cache_clear()
    cached_three()
    first = compiled(cache, Cached())
    refused = first.explain().reason
    assert "cache_clear" in refused
    record = cache.get_target(first.explain().target_key)[0]
    assert (record.refused, record.graph_hash) == (refused, first.graph_hash)
    assert [f.name for f in unpack_factors(record.factors)] == [f.name for f in first.explain().factors]
    (file,) = target_files(cache)
    before = file.stat().st_mtime_ns
    report = explain_target(target(Cached()), cache)
    assert (report["verdict"], report["reason"], report["trace"]) == ("off", refused, None)
    assert "capture" not in report["seconds"]
    again = compiled(cache, Cached())
    assert (again.cache_hit, again.explain().reason) == ("graph", refused)
    assert file.stat().st_mtime_ns == before, "the same is not written again by each process"
    cached_three.cache_clear()
    assert compiled(cache, Cached()).cache_hit == "graph"
    assert compiled(cache, Cached()).cache_hit == "direct", "a sound capture puts the refusal right"


def test_a_refused_record_is_never_served(cache):
    told = compiled(cache).explain()
    record = cache.get_target(told.target_key)[0]
    cache.put_target(told.target_key, dataclasses.replace(record, refused="for the test"))
    again = compiled(cache)
    assert (again.cache_hit, again.explain().reason) == ("graph", "for the test")


def test_an_interfered_capture_does_not_undo_a_sound_one(tmp_path):
    cache = stitchcache.Cache(tmp_path)
    cached_three.cache_clear()
    first = compiled(cache, Cached())
    key = first.explain().target_key
    (tmp_path / "entries" / first.graph_hash[:2] / f"{first.graph_hash}.stitch").unlink()
    cached_three()
    again = compiled(cache, Cached())
    assert again.cache_hit is None
    assert "cache_clear" in again.explain().reason
    assert cache.get_target(key)[0].refused is None
    assert compiled(cache, Cached()).cache_hit == "direct"


def test_a_target_of_the_format_before_still_leads_there(cache):
    told = compiled(cache).explain()
    record = cache.get_target(told.target_key)[0]
    payload = {
        "key": told.target_key,
        "graph_hash": record.graph_hash,
        "sources": [{"module": s.module, "digest": s.digest, "size": s.size} for s in record.sources],
        "globals": [list(pair) for pair in record.globals],
        "label": record.label,
        "created": record.created,
    }
    body = pack(payload)
    prelude = PRELUDE.pack(b"STITCH\r\n", 3, 2, 0, len(body), 0, 0)
    whole = prelude + hashlib.sha256(prelude).digest() + body
    cache.put_target(told.target_key, record)
    (file,) = target_files(cache)
    file.chmod(0o600)
    file.write_bytes(whole + hashlib.sha256(whole).digest())
    assert cache.get_target(told.target_key)[0] == dataclasses.replace(record, factors=b"", code=())
    assert compiled(cache).cache_hit == "direct"
    assert explain_target(target(), cache)["verdict"] == "direct"


# ---- a target, looked up and not started


def test_a_target_that_is_a_direct_hit(cache):
    before = cache.stats().counters
    report = explain_target(target(), cache, trace=True)
    assert (report["verdict"], report["reason"], report["nearest"]) == ("direct", "", [])
    assert report["trace"]["graph_hash"] == report["graph_hash"]
    assert (report["trace"]["cached"], report["trace"]["refused"], report["trace"]["differences"]) == (
        True,
        None,
        [],
    )
    assert cache.stats().counters == before


def test_a_target_that_misses(cache):
    report = explain_target(target(Scaled(9.0)), cache, trace=True)
    assert (report["verdict"], report["graph_hash"]) == ("miss", None)
    (near,) = report["nearest"]
    assert [(found["old"], found["new"]) for found in near["differences"]] == [("2.0", "9.0")]
    assert not report["trace"]["cached"]
    assert report["trace"]["compared"] == near["graph_hash"]
    assert "graph.pieces" in [found["name"] for found in report["trace"]["differences"]]
    assert not target_files(cache)


def test_a_target_without_a_key(cache):
    model = Scaled()
    model.lock = torch.Generator()
    report = explain_target(target(model), cache)
    assert (report["verdict"], report["target_key"]) == ("off", None)
    assert "lock" in report["reason"]
    assert report["nearest"][0]["label"] == "Scaled"
    assert report["nearest"][0]["differences"] == [], "factors that were not reached are not compared"


def test_a_target_whose_piece_is_gone(tmp_path):
    cache = stitchcache.Cache(tmp_path)
    made = compiled(cache)
    for blob in made.artifact.blobs:
        (tmp_path / "blobs" / blob.digest[:2] / blob.digest).unlink()
    report = explain_target(target(), stitchcache.Cache(tmp_path, read_only=True))
    assert report["verdict"] == "miss"
    assert "missing or damaged" in report["reason"]
