"""Parameters made of other tensors, as torchao quantizes weights, are bound and keyed by their parts."""

from __future__ import annotations

import pytest
import scaled_models
import torch

import stitchcache
from stitchcache.errors import BindError, CaptureError
from stitchcache.state import taken_apart

X = torch.linspace(-1, 1, 24).view(3, 8)

SOURCE = """
    import json, torch, stitchcache
    from capture import scaled_models
    model, x = scaled_models.model(OFFSET), torch.linspace(-1, 1, 24).view(3, 8)
    compiled = stitchcache.compile(model, (x,), backend="eager")
    with torch.no_grad():
        same = compiled(x).equal(model(x))
    print(json.dumps([compiled.cache_hit, same, str(compiled.explain())]))
"""


def compiled(model, tmp_path, **options):
    cache = stitchcache.Cache(tmp_path / "cache")
    return stitchcache.compile(model, (X,), backend="eager", cache=cache, **options)


@torch.no_grad()
def test_inner_tensors_are_bound_by_name(tmp_path):
    model = scaled_models.model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    made = compiled(model, tmp_path)
    assert made.check.state == "agreed"
    assert made.model is model
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    names = {name for item in made.artifact.bindings for name in (item.name, *item.aliases)}
    assert {
        "second.weight.scale",
        "first.weight.packed.pairs",
        "first.weight.scale",
        "first.bias",
        "last.weight",
    } <= names
    assert "stitchcache_scaled" not in "".join(variant.code for variant in made.artifact.variants)
    assert made(X).equal(model(X))
    # In place: both layers have it.
    model.second.weight.scale.mul_(2)
    assert made(X).equal(model(X))
    assert made.is_current()


@torch.no_grad()
def test_another_weight_is_seen_and_can_be_bound(tmp_path):
    model = scaled_models.model()
    made = compiled(model, tmp_path)
    model.first.weight = model.second.weight = scaled_models.weight(8, 8, 7, seed=1)
    assert not made.is_current()
    assert made.rebind(model)(X).equal(model(X))
    assert made.is_current()
    again = stitchcache.load(made.graph_hash, model, cache=made.came_from)
    assert again(X).equal(model(X))
    other = scaled_models.model()
    other.first.weight = other.second.weight = scaled_models.weight(8, 8, 5)
    with pytest.raises(BindError, match="context"):
        made.rebind(other)


def test_an_op_that_the_class_does_not_take_is_refused_with_a_way_out(tmp_path):
    model = torch.nn.Embedding(8, 8).eval()
    model.weight = scaled_models.weight(8, 8, 7)
    cache = stitchcache.Cache(tmp_path / "cache")
    with pytest.raises(CaptureError, match="Leave that parameter as it was"):
        stitchcache.compile(model, (torch.tensor([1, 2]),), backend="eager", cache=cache)


def test_what_stands_beside_the_numbers_is_in_the_key(fresh_process):
    for offset, hit in ((7, None), (5, None), (7, "direct")):
        found, same, why = fresh_process(SOURCE.replace("OFFSET", str(offset)))
        assert (found, same) == (hit, True), why


@torch.no_grad()
def test_a_model_taken_apart_is_the_model():
    model = scaled_models.model()
    apart = taken_apart(model)
    assert apart(X).equal(model(X))
    assert apart.first is not model.first
    assert apart.last.weight is model.last.weight
    assert dict(apart.named_buffers())["first.weight.scale"] is model.first.weight.scale
    with pytest.raises(RuntimeError):
        apart(X[:, :3])
    # Whole during a call only, also where it fails.
    assert "weight" not in apart.first._parameters
    plain = torch.nn.Linear(2, 2)
    assert taken_apart(plain) is plain
