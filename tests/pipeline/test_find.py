"""find(): what is served, and the reason where nothing is."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import stitchcache
from stitchcache import errors
from stitchcache.pipeline.find import Hit, Miss, Request, find, find_by_graph, want


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x * 3


ARGS = (torch.ones(3),)


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path)


def wanted(cache, **options):
    return want(Scaled().eval(), ARGS, {}, Request(backend="eager", check="none", **options), cache)


def compiled(cache, **options):
    return stitchcache.compile(Scaled().eval(), ARGS, backend="eager", check="none", cache=cache, **options)


def test_nothing_there(cache):
    found = find(wanted(cache))
    assert isinstance(found, Miss)
    assert (found.cause, found.record) == ("new", None)
    assert "no entry" in found.reason


def test_by_key_and_by_graph(cache):
    first = compiled(cache)
    found = find(wanted(cache))
    assert isinstance(found, Hit)
    assert found.artifact.graph_hash == first.graph_hash
    assert found.record is not None
    by_graph = find_by_graph(first.graph_hash, wanted(cache).site)
    assert isinstance(by_graph, Hit)
    assert by_graph.record is None
    assert isinstance(find_by_graph("0" * 64, wanted(cache).site), Miss)


def test_finding_changes_nothing(cache):
    compiled(cache)
    subject = wanted(cache)
    first, second = find(subject), find(subject)
    assert (first.artifact, first.record, first.way) == (second.artifact, second.record, second.way)


def test_a_model_without_a_key(cache):
    model = Scaled().eval()
    model.lock = threading.Lock()
    found = find(want(model, ARGS, {}, Request(backend="eager"), cache))
    assert isinstance(found, Miss)
    assert found.cause == "unkeyable"
    assert "lock" in found.reason


def other(record, value):
    """The record of another configuration: it read an environment variable that has another value here."""
    return replace(record, globals=(*record.globals, ("env:STITCHCACHE_TEST_CONFIGURATION", value)))


def test_of_several_records_the_newest_that_is_true_is_taken(cache):
    entry = compiled(cache)
    key = entry.explain().target_key
    (mine,) = cache.get_target(key)
    cache.put_target(key, other(mine, "0" * 64))
    assert len(cache.get_target(key)) == 2
    found = find(wanted(cache))
    assert isinstance(found, Hit)
    assert found.record.globals == mine.globals


def test_of_several_records_that_are_not_true_the_newest_gives_the_reason(cache):
    entry = compiled(cache)
    key = entry.explain().target_key
    (mine,) = cache.get_target(key)
    (cache.root / "targets" / key[:2] / key).unlink()
    for record in (replace(mine, sources=(replace(mine.sources[0], size=1),)), other(mine, "0" * 64)):
        cache.put_target(key, record)
    found = find(wanted(cache))
    assert isinstance(found, Miss)
    assert (found.cause, found.record) == ("sources", cache.get_target(key)[0])
    assert "STITCHCACHE_TEST_CONFIGURATION" in found.reason


def test_a_refused_record_that_is_true_is_not_gone_past(cache):
    """An older record of the same configuration must not be served when a newer one was refused."""
    entry = compiled(cache)
    key = entry.explain().target_key
    (mine,) = cache.get_target(key)
    cache.put_target(key, replace(mine, globals=(), refused="the look found a difference"))
    assert len(cache.get_target(key)) == 2
    found = find(wanted(cache))
    assert isinstance(found, Miss)
    assert (found.cause, found.reason) == ("unkeyable", "the look found a difference")


def test_a_refused_record_of_another_configuration_is_gone_past(cache):
    entry = compiled(cache)
    key = entry.explain().target_key
    (mine,) = cache.get_target(key)
    cache.put_target(key, replace(other(mine, "0" * 64), refused="the look found a difference"))
    assert isinstance(find(wanted(cache)), Hit)


def test_a_required_direct_hit(cache, monkeypatch):
    with pytest.raises(errors.CacheMissError, match=r"tracing is an error.*prewarm") as caught:
        compiled(cache, require="direct")
    assert caught.value.reason == "no entry for this target"
    entry = compiled(cache)
    assert compiled(cache, require="direct").cache_hit == "direct"
    key = entry.explain().target_key
    (cache.root / "targets" / key[:2] / key).unlink()
    with pytest.raises(errors.CacheMissError, match="no entry for this target"):
        compiled(cache, require="direct")
    monkeypatch.setenv("STITCHCACHE_REQUIRE", "direct")
    with pytest.raises(errors.CacheMissError):
        compiled(cache)
    monkeypatch.setenv("STITCHCACHE_REQUIRE", "1")
    assert compiled(cache).cache_hit == "graph", "a graph hit is enough where only compiling is forbidden"
    monkeypatch.setenv("STITCHCACHE_REQUIRE", "direct")
    assert compiled(cache).cache_hit == "direct"


def test_check_is_in_no_key(cache):
    compiled(cache)
    again = stitchcache.compile(Scaled().eval(), ARGS, backend="eager", cache=cache, check="example")
    assert again.cache_hit == "direct"


@pytest.mark.parametrize(("apart", "kinds"), [(False, ("cpu", "cuda")), (True, ("cpu",))])
def test_devices_in_a_key_are_those_of_what_a_wrapped_tensor_is_made_of(cache, monkeypatch, apart, kinds):
    from stitchcache.keys import environment
    from stitchcache.pipeline import find as module

    other, seen = Scaled().eval(), []
    factors = environment.environment_factors
    monkeypatch.setattr(environment, "_gpu", lambda: "a GPU")
    monkeypatch.setattr(
        environment,
        "environment_factors",
        lambda backend, devices: seen.append(tuple(devices)) or factors(backend, devices),
    )
    # A tensor may say another device than that of the tensors inside of it.
    monkeypatch.setattr(module, "devices_of", lambda *_: ("cuda:0", ("cpu", "cuda")))
    if apart:
        monkeypatch.setattr(module, "taken_apart", lambda model: other)
    wanted(cache)
    assert seen == [kinds]
