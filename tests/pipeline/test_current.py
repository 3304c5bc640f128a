"""Whether a model still is what was compiled: is_current() and rebind()."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

import stitchcache
from stitchcache import errors
from stitchcache.pipeline import without_data


class Net(torch.nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.scale = scale
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x):
        return self.inner(x) * self.scale + self.offset


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path)


X = torch.ones(2, 3)


def compiled(cache, model, args=(X,)):
    return stitchcache.compile(model, args, backend="eager", cache=cache, check="none")


def test_a_model_is_current_on_every_road(cache):
    cold = compiled(cache, Net().eval())
    direct = compiled(cache, Net().eval())
    (cache.root / "targets").rename(cache.root / "elsewhere")
    graph = compiled(cache, Net().eval())
    loaded = stitchcache.load(cold.graph_hash, Net().eval(), cache=cache)
    assert [c.cache_hit for c in (cold, direct, graph, loaded)] == [None, "direct", "graph", "graph"]
    for each in (cold, direct, graph, loaded):
        assert each.is_current()
        with torch.no_grad():
            each.model.inner.weight.add_(1)
        assert each.is_current(), "values of parameters are bound, not compiled"
        each.model.scale = 5.0
        assert not each.is_current()


def test_rebind_refuses_what_would_trace_to_something_else(cache):
    model = Net().eval()
    bound = compiled(cache, model)
    with pytest.raises(errors.BindError, match=r"another model: model\.attributes.*scale") as caught:
        bound.rebind(Net(scale=3.0).eval())
    assert "scale" in caught.value.name
    with pytest.raises(errors.BindError, match=r"model\.training"):
        bound.rebind(Net().train())
    torch.testing.assert_close(bound(X), model(X))
    other = Net().eval()
    bound.rebind(other)
    torch.testing.assert_close(bound(X), other(X))


def test_rebind_after_the_model_itself_was_changed(cache):
    model = Net().eval()
    bound = compiled(cache, model)
    model.scale = 7.0
    with pytest.raises(errors.BindError, match="scale"):
        bound.rebind(model)


def test_torchs_settings_count(cache):
    bound = compiled(cache, Net().eval())
    torch.set_float32_matmul_precision("medium")
    try:
        assert not bound.is_current()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert bound.is_current()


def test_what_no_key_stands_for(cache):
    model = Net().eval()
    model.lock = threading.Lock()
    bound = compiled(cache, model)
    assert not bound.is_current()
    with pytest.raises(errors.BindError, match=r"lock.*trust_model=True"):
        bound.rebind(model)
    bound.rebind(model, trust_model=True)
    torch.testing.assert_close(bound(X), model(X))


def test_the_example_is_not_kept(cache):
    example = torch.ones(2, 3)
    compiled(cache, Net().eval())
    bound = compiled(cache, Net().eval(), (example,))
    gone = weakref.ref(example)
    del example
    gc.collect()
    assert gone() is None
    assert bound.is_current()


def test_leaves_without_data():
    x = torch.ones(4, 6)[:, ::2]
    stood, same, number = without_data([x, x, 3])
    assert stood is same
    assert (stood.shape, stood.stride(), stood.dtype) == (x.shape, x.stride(), x.dtype)
    assert stood.device.type == "meta"
    assert number == 3
