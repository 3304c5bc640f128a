"""Which tensors of a model a compiled model reads and writes."""

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache import errors


class Layer:
    """Holds state outside of the module tree, as the layers of a static cache do."""

    def __init__(self):
        self.keys = torch.zeros(4)


class Decoder(nn.Module):
    """Writes into a plain object, and counts in a buffer that a dict leads to as well."""

    def __init__(self):
        super().__init__()
        self.cache = [Layer(), Layer()]
        self.register_buffer("count", torch.zeros(()))
        self.table = {"count": self.count}
        self.weight = nn.Parameter(torch.full((4,), 2.0))
        self.weights = [self.weight]

    def forward(self, x):
        self.table["count"].add_(1)
        for layer in self.cache:
            layer.keys.mul_(0.5).add_(x.sum(0))
        return x * self.weights[0] + self.cache[1].keys + self.count


@pytest.fixture
def build(tmp_path):
    def build(model, *args, **options):
        cache = stitchcache.Cache(tmp_path / "cache")
        return stitchcache.compile(model.eval(), args, backend="eager", cache=cache, **options)

    return build


def test_two_compiled_models_share_the_state_of_one_model(build):
    eager, model = Decoder(), Decoder()
    prefill, decode = build(model, torch.ones(3, 4)), build(model, torch.ones(1, 4))
    assert prefill.graph_hash != decode.graph_hash
    assert not model.cache[0].keys.any(), "compiling left something behind"
    for step in range(5):
        x = torch.full((1, 4) if step % 2 else (3, 4), float(step))
        assert torch.equal((decode if step % 2 else prefill)(x), eager(x))
    assert torch.equal(model.cache[0].keys, eager.cache[0].keys)
    assert torch.equal(model.count, eager.count)


def test_another_start_binds_the_state_of_the_model_that_it_is_given(build):
    build(Decoder(), torch.ones(1, 4))
    model, eager = Decoder(), Decoder()
    compiled = build(model, torch.ones(1, 4))
    assert compiled.cache_hit
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(1, 4)), eager(torch.ones(1, 4)))
    model.cache[1].keys.zero_()
    eager.cache[1].keys.zero_()
    assert torch.equal(compiled(torch.ones(1, 4)), eager(torch.ones(1, 4)))


def test_rebind_takes_the_other_models_state(build):
    compiled = build(Decoder(), torch.ones(1, 4))
    compiled(torch.ones(1, 4))
    other, eager = Decoder().eval(), Decoder()
    compiled.rebind(other)
    assert torch.equal(compiled(torch.ones(1, 4)), eager(torch.ones(1, 4)))
    assert torch.equal(other.cache[0].keys, eager.cache[0].keys)


def test_tensors_that_were_one_must_be_one(build):
    compiled = build(Decoder(), torch.ones(1, 4))
    other = Decoder()
    other.table["count"] = torch.zeros(())
    with pytest.raises(errors.StitchCacheError, match="count"):
        compiled.rebind(other)


def test_state_that_is_gone(build):
    compiled = build(Decoder(), torch.ones(1, 4))
    other = Decoder()
    del other.cache[1].keys
    with pytest.raises(errors.StitchCacheError, match="keys"):
        compiled.rebind(other)


def test_state_of_another_shape(build):
    compiled = build(Decoder(), torch.ones(1, 4))
    other = Decoder()
    other.cache[0].keys = torch.zeros(1, 4)
    with pytest.raises(errors.StitchCacheError, match="keys"):
        compiled.rebind(other)


def test_a_view_of_a_buffer_is_written(build):
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("all", torch.zeros(4))
            self.parts = [self.all[:2], self.all[2:]]

        def forward(self, x):
            self.parts[1].add_(x)
            return self.all * 2

    compiled, eager = build(Viewed(), torch.ones(2)), Viewed()
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(2)), eager(torch.ones(2)))
