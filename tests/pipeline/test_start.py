"""start() by load(): the environment and the model are compared before anything is mapped."""

from __future__ import annotations

import logging
import pickle
import threading
from dataclasses import replace

import pytest
import torch

import stitchcache
from stitchcache import errors
from stitchcache.pieces.eager import EagerBackend


class Net(torch.nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.scale = scale

    def forward(self, x):
        return self.inner(x) * self.scale


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path)


@pytest.fixture
def entry(cache):
    torch.manual_seed(0)
    model = Net().eval()
    return stitchcache.compile(model, (torch.ones(2, 3),), backend="eager", cache=cache, check="none")


def put_changed(cache, artifact, **values):
    """The entry as another machine would have made it."""
    changed = tuple(
        replace(factor, value=values[factor.name], digest="0" * 64) if factor.name in values else factor
        for factor in artifact.factors
    )
    made = replace(artifact, graph_hash="ab" * 32, factors=changed)
    cache.put(made)
    return made.graph_hash


@pytest.mark.parametrize("factor", ["env.torch", "env.platform", "env.python"])
def test_another_environment_is_refused_before_anything_is_mapped(cache, entry, monkeypatch, factor):
    name = put_changed(cache, entry.artifact, **{factor: "something else"})
    mapped = []
    monkeypatch.setattr(EagerBackend, "load", lambda *args: mapped.append(args))
    with pytest.raises(errors.EnvironmentMismatchError) as caught:
        stitchcache.load(name, Net().eval(), cache=cache)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.factor, error.expected) == (factor, "something else")
    assert error.actual
    for word in (factor, "something else", error.actual, name[:12]):
        assert word in str(error)
    assert mapped == []


def test_a_preload_maps_nothing_of_another_environment(cache, entry, monkeypatch):
    name = put_changed(cache, entry.artifact, **{"env.torch": "something else"})
    mapped = []
    monkeypatch.setattr("stitchcache.torchside.load_library", lambda *args: mapped.append(args))
    preloaded = stitchcache.preload(name, cache=cache)
    assert preloaded.wait(60)
    assert mapped == []


def test_an_entry_that_says_nothing_of_its_environment(cache, entry):
    made = replace(entry.artifact, graph_hash="cd" * 32, factors=())
    cache.put(made)
    with pytest.raises(errors.EnvironmentMismatchError, match="not recorded"):
        stitchcache.load(made.graph_hash, Net().eval(), cache=cache)


def test_loading_is_said_and_counted(cache, entry, caplog):
    with caplog.at_level(logging.INFO, logger="stitchcache"):
        loaded = stitchcache.load(entry.graph_hash, Net().eval(), cache=cache)
    (line,) = [record.message for record in caplog.records if record.name == "stitchcache"]
    assert line.startswith(f"Net: loaded {entry.graph_hash[:12]} in ")
    assert set(loaded.timings) >= {"key", "load", "link", "total"}
    counters = cache.stats().counters
    assert counters["hit.load"] == 1
    assert "hit.graph" not in counters


def test_another_attribute_or_class_is_another_model(cache, entry):
    for wrong in (Net(scale=3.0).eval(), torch.nn.Sequential(torch.nn.Linear(3, 3)).eval()):
        with pytest.raises(errors.BindError, match=r"another model: model\.") as caught:
            stitchcache.load(entry.graph_hash, wrong, cache=cache)
        assert caught.value.name.startswith("model.")
    more = Net().eval()
    more.extra = 1
    with pytest.raises(errors.BindError, match="extra"):
        stitchcache.load(entry.graph_hash, more, cache=cache)


def test_a_model_that_cannot_be_compared_is_refused_unless_trusted(cache):
    model = Net().eval()
    model.lock = threading.Lock()
    x = torch.ones(2, 3)
    entry = stitchcache.compile(model, (x,), backend="eager", cache=cache, check="none")
    with pytest.raises(errors.BindError, match=r"lock.*trust_model=True"):
        stitchcache.load(entry.graph_hash, model, cache=cache)
    loaded = stitchcache.load(entry.graph_hash, model, cache=cache, trust_model=True)
    torch.testing.assert_close(loaded(x), model(x))


def test_trust_does_not_reach_what_is_known_to_differ(cache, entry):
    with pytest.raises(errors.BindError, match="another model"):
        stitchcache.load(entry.graph_hash, Net(scale=3.0).eval(), cache=cache, trust_model=True)


def test_a_blob_that_is_gone(cache, entry):
    cache.blob_path(entry.artifact.blobs[0]).unlink()
    with pytest.raises(errors.EntryDamagedError, match="missing or damaged"):
        stitchcache.load(entry.graph_hash, Net().eval(), cache=cache)
