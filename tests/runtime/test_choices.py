"""Calls after a model has chosen another of its parts: another adapter, or one that is merged or off."""

import copy

import pytest
import torch
from rebound_models import Net
from torch import nn

import stitchcache
from stitchcache.errors import InputMismatchError
from stitchcache.runtime.choices import over_choices

X = torch.arange(8.0).reshape(2, 4)


@pytest.fixture
def build(tmp_path):
    def build(model, **options):
        cache = stitchcache.Cache(tmp_path / "cache")
        return stitchcache.compile(model.eval(), (X,), backend="eager", cache=cache, **options)

    return build


def test_another_adapter_is_refused_until_it_is_switched_back(build):
    model = Net()
    for compiled in (build(model), build(model)):
        torch.testing.assert_close(compiled(X), model(X))
        model.set_adapter("two")
        with pytest.raises(
            InputMismatchError, match=r"layers\.0\.active was \['one'\].*is \['two'\]"
        ) as caught:
            compiled(X)
        assert caught.value.argument == "layers.0.active"
        # Equal, and another list than before.
        model.set_adapter("one")
        torch.testing.assert_close(compiled(X), model(X))


def test_or_the_model_itself_serves(build):
    model = Net()
    compiled = build(model, on_mismatch="eager")
    model.set_adapter("two")
    torch.testing.assert_close(compiled(X), model(X))
    assert compiled.mismatches == {"layers.0.active": 1}
    model.set_adapter("one")
    torch.testing.assert_close(compiled(X), model(X))
    assert compiled.mismatches == {"layers.0.active": 1}


@pytest.mark.parametrize("layer", [0, 1])
def test_a_switch_counts_in_the_first_and_in_the_last_module(build, layer):
    model = Net()
    compiled = build(model)
    model.layers[layer].merged = True
    with pytest.raises(InputMismatchError, match=rf"layers\.{layer}\.merged was False"):
        compiled(X)


def test_an_adapter_that_is_added_and_not_chosen_changes_nothing(build):
    model = Net()
    for layer in model.layers:
        layer.scaling = {"one": 1.0, "two": 2.0}
    compiled = build(model)
    for layer in model.layers:
        layer.lora_a["three"], layer.lora_b["three"] = nn.Linear(4, 2), nn.Linear(2, 4)
        layer.scaling["three"] = 3.0
    torch.testing.assert_close(compiled(X), model(X))
    model.layers[0].scaling["one"] = 4.0
    with pytest.raises(InputMismatchError, match=r"layers\.0\.scaling"):
        compiled(X)


def test_models_that_share_weights_serve_their_adapters_side_by_side(build):
    one = Net().eval()
    shared = {id(tensor): tensor for tensor in (*one.parameters(), *one.buffers())}
    two = copy.deepcopy(one, shared)
    two.set_adapter("two")
    compiled = build(one), build(two)
    with torch.no_grad():
        one.layers[0].base.weight.mul_(2)
    for model, each in zip((one, two), compiled, strict=True):
        torch.testing.assert_close(each(X), model(X))


class Plain(nn.Module):
    """Holds parts by name, and chooses none of them by an attribute."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"one": nn.Identity()})
        self.kind, self.names = "wide", []

    @property
    def active(self):
        raise AssertionError("a property is not run")


def test_a_model_that_chooses_nothing_by_name_pays_nothing():
    assert over_choices(len, Plain()) is len
    assert over_choices(len, nn.Linear(2, 2)) is len


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0", "1"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config, "one")
    model.add_adapter("two", config)
    return model


def test_adapters_of_peft(build, adapted):
    compiled = build(adapted)
    assert build(adapted).cache_hit == "direct"
    torch.testing.assert_close(compiled(X), adapted(X))
    adapted.set_adapter("two")
    with pytest.raises(InputMismatchError, match="_active_adapter"):
        compiled(X)
    adapted.set_adapter("one")
    torch.testing.assert_close(compiled(X), adapted(X))
    with adapted.disable_adapter(), pytest.raises(InputMismatchError, match="_disable_adapters"):
        compiled(X)
    torch.testing.assert_close(compiled(X), adapted(X))
    layers = [module for module in adapted.modules() if hasattr(type(module), "set_scale")]
    for layer in layers:
        layer.set_scale("one", 3.0)
    with pytest.raises(InputMismatchError, match="scaling"):
        compiled(X)
    for layer in layers:
        layer.set_scale("one", 1.0)
    torch.testing.assert_close(compiled(X), adapted(X))
    adapted.merge_adapter()
    with pytest.raises(InputMismatchError, match="merged_adapters"):
        compiled(X)
