"""What a forward keeps from one call to the next: the model stays as it was, and no second call is wrong."""

import random

import numpy as np
import pytest
import torch
from carrying_models import (
    KEPT,
    Counts,
    CountsBeside,
    Draws,
    FillsNone,
    FillsObject,
    Grows,
    KeepsOutside,
    Rebinds,
    Registers,
    Returns,
    Stashes,
)
from torch import nn

import stitchcache
from stitchcache.errors import CaptureError, ModelMismatchError, StitchCacheError
from stitchcache.torchside import has_fakes

X = torch.arange(8.0).reshape(2, 4)


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path / "cache")


def _compile(cache, model, x=X, **options):
    return stitchcache.compile(model.eval(), (x,), backend="eager", cache=cache, **options)


@pytest.mark.parametrize("check", ["example", "none"])
@pytest.mark.parametrize("kind", [Registers, FillsNone])
def test_a_buffer_that_the_forward_registers_is_refused_and_not_left_behind(cache, kind, check):
    model = kind()
    with pytest.raises(CaptureError, match="registers the buffer 'table' when it runs first"):
        _compile(cache, model, check=check)
    assert not has_fakes(model.buffers())
    # As the error says: after a call it is there.
    want = model(X)
    compiled = _compile(cache, model, check=check)
    given = X.clone()
    torch.testing.assert_close(compiled(given), want)
    assert torch.equal(given, X)


def test_a_constant_kept_in_an_object_is_no_leftover_of_the_trace(cache):
    for hit in (None, "direct"):
        model = FillsObject()
        compiled = _compile(cache, model)
        assert (compiled.cache_hit, compiled.check.state) == (hit, "agreed")
        torch.testing.assert_close(compiled(X), X * 3)
        assert not has_fakes([model.bag.table])
        torch.testing.assert_close(model(X), X * 3)


@pytest.mark.parametrize("where", ["own", "listed", "bag"])
def test_another_tensor_in_the_place_of_one_that_is_read_is_a_mismatch(cache, where):
    model = Rebinds(where)
    with pytest.raises(ModelMismatchError, match=r"attribute:.* differs by"):
        _compile(cache, model)
    for tensor in (model.own, model.listed[0], model.bag.table["k"]):
        assert torch.equal(tensor, torch.zeros(2, 4))


@pytest.mark.parametrize("where", ["own", "bag"])
def test_a_number_that_is_counted_and_read_is_a_mismatch(cache, where):
    model = Counts(where, read=True)
    with pytest.raises(ModelMismatchError, match="a second call gives another result"):
        _compile(cache, model)
    assert (model.number, model.bag.number, model.seen) == (1, 1, [])


@pytest.mark.parametrize("where", ["own", "bag"])
def test_a_number_that_is_only_counted_is_none(cache, where):
    model = Counts(where, read=False)
    assert _compile(cache, model).check.state == "agreed"
    assert (model.number, model.bag.number, model.seen) == (1, 1, [])


def test_a_list_that_grows_and_is_read_is_a_mismatch(cache):
    model = Grows()
    with pytest.raises(ModelMismatchError, match="a second call gives another result"):
        _compile(cache, model)
    assert model.bag.given == []


@pytest.mark.parametrize("beside", ["buffer", "random", "argument"])
def test_a_number_that_is_read_is_a_mismatch_whatever_else_is_written_or_drawn(cache, beside):
    model, x = CountsBeside(beside, read=True), X.clone()
    with pytest.raises(ModelMismatchError, match="a second call gives another result"):
        _compile(cache, model, x)
    assert (model.number, model.total.item()) == (0, 0)
    assert torch.equal(x, X)


@pytest.mark.parametrize("beside", ["buffer", "random", "argument", "full"])
def test_a_number_that_is_not_read_is_none_whatever_else_is_written_or_drawn(cache, beside):
    model = CountsBeside(beside, read=False)
    assert _compile(cache, model, X.clone()).check.state == "agreed"
    assert (model.number, model.total.item()) == (0, 0)


def test_a_tensor_of_the_trace_in_a_global_is_named(cache):
    KEPT.clear()
    with pytest.raises(StitchCacheError, match="returns a tensor without data"):
        _compile(cache, KeepsOutside())
    KEPT.clear()


def test_a_result_left_in_an_attribute_is_no_mismatch(cache):
    model = Stashes()
    model(X + 1)
    left = model.last
    assert _compile(cache, model).check.state == "agreed"
    assert model.last is left


def test_a_cold_compile_draws_no_numbers(cache):
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    compiled = _compile(cache, Draws())
    assert compiled.cache_hit is None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[2]) == before[1:]


def test_a_lazy_module_is_to_be_called_once(cache):
    model = nn.LazyLinear(4)
    with pytest.raises(CaptureError, match="Call the model once"):
        _compile(cache, model)
    model(X)
    torch.testing.assert_close(_compile(cache, model)(X), model(X))


def test_a_result_that_holds_a_shape_is_no_mismatch(cache):
    for hit in (None, "direct"):
        compiled = _compile(cache, Returns("shape"))
        assert (compiled.cache_hit, compiled.check.state) == (hit, "agreed")
        assert compiled(X)[1] == X.shape


@pytest.mark.parametrize("what", ["error", "nan"])
def test_whatever_a_trace_raises_is_a_capture_error(cache, what):
    with pytest.raises(CaptureError, match="Odd: no" if what == "error" else "nan"):
        _compile(cache, Returns(what))


def test_replaced_weights_are_not_current(cache):
    model = nn.Linear(4, 4)
    compiled = _compile(cache, model)
    assert compiled.is_current()
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()}, assign=True)
    assert not compiled.is_current()
    compiled.rebind(model)
    assert compiled.is_current()
    torch.testing.assert_close(compiled(X), model(X))


def test_a_target_with_odd_arguments_does_not_stop_the_next(cache):
    def model():
        return nn.Linear(4, 4).eval(), (X,)

    targets = [
        stitchcache.Target("odd", lambda: (nn.Linear(4, 4), 6), backend="eager"),
        stitchcache.Target("right", model, backend="eager"),
    ]
    report = stitchcache.prewarm(targets, cache=cache)
    assert [result.status for result in report.results] == ["failed", "compiled"]
