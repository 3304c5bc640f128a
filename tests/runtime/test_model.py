"""Rebinding a compiled model, and whether it is still what its model would be traced to."""

import copy

import pytest
import rebound_models
import torch
from rebound_models import ByGlobal, Counts, Net, Opaque

import stitchcache
from stitchcache import errors
from stitchcache.errors import BindError


@pytest.fixture
def build(tmp_path):
    def build(model, *args, **options):
        cache = stitchcache.Cache(tmp_path / "cache")
        return stitchcache.compile(model.eval(), args, backend="eager", cache=cache, **options)

    return build


X = torch.arange(8.0).reshape(2, 4)


def test_another_adapter_is_another_model(build):
    model = Net()
    compiled = build(model, X)
    assert compiled.is_current()
    torch.testing.assert_close(compiled(X), model(X))
    model.set_adapter("two")
    assert not compiled.is_current()
    with pytest.raises(errors.BindError, match=r"Lora\.active was"):
        compiled.rebind(model)
    second = build(model, X)
    assert second.graph_hash != compiled.graph_hash
    torch.testing.assert_close(second(X), model(X))
    model.set_adapter("one")
    assert compiled.is_current()
    assert compiled.rebind(model) is compiled
    torch.testing.assert_close(compiled(X), model(X))


def test_an_adapter_that_is_merged_in_place_is_seen(build):
    model = Net()
    compiled = build(model, X)
    with torch.no_grad():
        model.layers[0].base.weight.add_(1)
    assert compiled.is_current()
    torch.testing.assert_close(compiled(X), model(X))


def test_an_attribute_that_is_new_or_gone(build):
    compiled = build(Net(), X)
    other = Net().eval()
    other.layers[1].scale = 2.0
    with pytest.raises(errors.BindError, match="compiled from another model"):
        compiled.rebind(other)
    other = Net().eval()
    del other.layers[0].merged, other.layers[1].merged
    with pytest.raises(errors.BindError, match="compiled from another model"):
        compiled.rebind(other)


def test_state_that_calls_change_is_no_change_of_the_model(build):
    model = Counts()
    compiled = build(model, X)
    compiled(X)
    assert compiled.is_current()
    assert compiled.rebind(model) is compiled
    assert torch.equal(compiled(X), X * 2)


def test_a_direct_hit_knows_too(build):
    build(Net(), X)
    model = Net()
    compiled = build(model, X)
    assert compiled.cache_hit == "direct"
    assert compiled.is_current()
    model.set_adapter("two")
    assert not compiled.is_current()


def test_a_global_that_the_capture_read(build, monkeypatch):
    compiled = build(ByGlobal(), X)
    assert compiled.is_current()
    monkeypatch.setattr(rebound_models, "SCALE", 3.0)
    assert not compiled.is_current()


def test_a_model_that_cannot_be_compared(build):
    compiled = build(Opaque(), X)
    assert not compiled.is_current()
    with pytest.raises(errors.BindError, match="trust_model=True"):
        compiled.rebind(Opaque())
    assert torch.equal(compiled.rebind(Opaque(), trust_model=True)(X), X + 1)


def test_loaded_by_its_hash(build, tmp_path):
    made = build(Net(), X)
    model = Net().eval()
    compiled = stitchcache.load(made.graph_hash, model, cache=stitchcache.Cache(tmp_path / "cache"))
    assert compiled.is_current()
    model.set_adapter("two")
    assert not compiled.is_current()
    with pytest.raises(errors.BindError):
        compiled.rebind(model)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(2, 2)
        self.config = {"width": 2}

    def forward(self, x):
        return self.proj(x)


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = Layer(), torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.layer(x))


def test_a_compiled_submodule_takes_its_models_place(tmp_path):
    whole, x = Whole().eval(), torch.ones(3, 2)
    want, names = whole(x), [name for name, _ in whole.named_modules()]
    keys = list(whole.state_dict())
    own = whole.layer
    whole.layer = stitchcache.compile(own, (x,), backend="eager", cache=stitchcache.Cache(tmp_path))
    torch.testing.assert_close(whole(x), want)
    assert list(whole.state_dict()) == keys
    assert [name for name, _ in whole.named_modules()] == names
    assert whole.layer.config is own.config
    assert not hasattr(whole.layer, "nothing")
    whole.load_state_dict({name: value * 2 for name, value in whole.state_dict().items()})
    torch.testing.assert_close(whole(x), whole.head(own(x)))
    # Training what is around it leaves it as it is.
    assert whole.train().training
    assert not own.training
    # A method of the model's own reaches compiled code where the user puts it there.
    compiled, own.forward = whole.layer, whole.layer.forward
    assert own.forward is compiled.forward
    torch.testing.assert_close(own(x), compiled(x))
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.deepcopy(whole)


def test_a_model_that_was_converted_after_it_was_compiled(tmp_path):
    model, x = Layer().eval(), torch.ones(3, 2)
    compiled = stitchcache.compile(model, (x,), backend="eager", cache=stitchcache.Cache(tmp_path))
    model.bfloat16()
    with pytest.raises(BindError, match=r"proj\.weight was float32 cpu .* and is bfloat16 cpu now"):
        compiled(x)
    model.float()
    torch.testing.assert_close(compiled(x), model(x))
