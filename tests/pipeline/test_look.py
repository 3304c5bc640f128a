"""A hit, and a fresh compilation, is compared with the model itself before anybody is served."""

import logging
import threading
from dataclasses import replace

import models
import pytest
import torch
from look_models import (
    GATE,
    REACHED,
    Asks,
    Caches,
    Fails,
    Misplaces,
    Noisy,
    Other,
    Plain,
    Scales,
    Slow,
    Turns,
)

import stitchcache
from stitchcache.errors import (
    CaptureError,
    ModelMismatchError,
    OptionError,
    PieceMismatchError,
    StaleEntryError,
)


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path / "cache")


def _compile(cache, model, x, **options):
    return stitchcache.compile(model, (x,), backend="eager", cache=cache, **options)


def _wrong_hit(cache, model, x, other, **options):
    """Let the model's target lead to another model's entry, as an incomplete key would."""
    wrong = _compile(cache, other, x)
    right = _compile(cache, model, x)
    assert wrong.graph_hash != right.graph_hash
    key = right.lookup[1].key
    record = cache.get_target(key)[0]
    cache.put_target(key, replace(record, graph_hash=wrong.graph_hash, code=()))
    return key, wrong, right


def test_a_hit_that_agrees_is_served_and_says_so(cache):
    model, x = Plain().eval(), torch.randn(2, 4)
    cold = _compile(cache, model, x)
    assert cold.check.state == "agreed"
    assert cold.artifact.check.state == "compared"
    assert [bound.name for bound in cold.artifact.check.bounds] == ["output['y']", "output['x']"]
    warm = _compile(cache, model, x)
    assert (warm.cache_hit, warm.check.state) == ("direct", "agreed")
    assert warm.check.seconds > 0
    assert "look" in warm.timings
    assert cache.counted()["look.agreed"] == 2


def test_a_wrong_direct_hit_is_a_miss_with_one_warning(cache, caplog):
    model, other, x = Plain().eval(), Other().eval(), torch.randn(2, 4)
    key, _wrong, right = _wrong_hit(cache, model, x, other)
    with caplog.at_level(logging.WARNING, "stitchcache"):
        served = _compile(cache, model, x)
    assert (served.cache_hit, served.graph_hash) == ("graph", right.graph_hash)
    torch.testing.assert_close(served(x), model(x))
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "output['y'] differs by" in said
    assert "report it" in said
    assert "found 1 wrong in this cache" in said
    assert "look: agreed" in str(served.explain())
    assert "output['y'] differs by" in served.explain().reason
    assert cache.counted()["look.mismatch"] == 1
    # It was traced again, so the next start hits directly, and rightly.
    again = _compile(cache, model, x)
    assert (again.cache_hit, again.graph_hash) == ("direct", right.graph_hash)
    assert key == again.lookup[1].key


def test_a_wrong_hit_is_served_without_the_look(cache):
    model, other, x = Plain().eval(), Other().eval(), torch.randn(2, 4)
    _, wrong, _ = _wrong_hit(cache, model, x, other)
    served = _compile(cache, model, x, check="none")
    assert served.graph_hash == wrong.graph_hash
    assert (served.check.state, served.check.reason) == ("unchecked", "check='none'")


def test_a_target_that_was_refused_stays_refused_until_it_is_traced(cache):
    model, other, x = Plain().eval(), Other().eval(), torch.randn(2, 4)
    _wrong_hit(cache, model, x, other)
    with pytest.raises(stitchcache.errors.CacheMissError, match="differs by"):
        _compile(cache, model, x, require="direct")
    with pytest.raises(stitchcache.errors.CacheMissError, match="differs by"):
        _compile(cache, model, x, require="direct", check="none")
    assert _compile(cache, model, x).cache_hit == "graph"
    assert _compile(cache, model, x, require="direct").cache_hit == "direct"


def test_an_environment_variable_that_no_key_saw(cache, monkeypatch):
    model, x = Scales().eval(), torch.randn(2, 4)
    _compile(cache, model, x)
    monkeypatch.setenv("LOOKTEST_FACTOR", "5")
    torch.testing.assert_close(_compile(cache, model, x)(x), model(x))


def test_in_the_background_a_wrong_hit_is_refused_at_the_next_call(cache):
    model, other, x = Plain().eval(), Other().eval(), torch.randn(2, 4)
    _, wrong, right = _wrong_hit(cache, model, x, other)
    served = _compile(cache, model, x, check="background")
    assert served.graph_hash == wrong.graph_hash
    _wait(served)
    assert (served.check.state, served.check.output) == ("mismatch", "output['y']")
    for _ in range(2):
        with pytest.raises(StaleEntryError, match=r"output\['y'\] differs by"):
            served(x)
    with pytest.raises(StaleEntryError):
        served.rebind(model)(x)
    assert cache.counted()["look.mismatch"] == 1
    assert _compile(cache, model, x).graph_hash == right.graph_hash


def test_in_the_background_a_right_hit_is_served(cache):
    model, x = Plain().eval(), torch.randn(2, 4)
    _compile(cache, model, x)
    served = _compile(cache, model, x, check="background")
    assert served.cache_hit == "direct"
    torch.testing.assert_close(served(x), model(x))
    _wait(served)
    assert served.check.state == "agreed"


def test_in_the_background_the_arguments_are_copies(cache):
    model, x = Slow().eval(), torch.randn(2, 4)
    _compile(cache, model, x)
    GATE.clear()
    REACHED.clear()
    served = _compile(cache, model, x, check="background")
    assert served.check.state == "pending"
    x.fill_(float("nan"))
    GATE.set()
    _wait(served)
    assert served.check.state == "agreed"


def test_in_the_background_weights_that_change_prove_nothing(cache):
    model, x = Slow().eval(), torch.randn(2, 4)
    _compile(cache, model, x)
    GATE.clear()
    REACHED.clear()
    served = _compile(cache, model, x, check="background")
    assert REACHED.wait(20)
    with torch.no_grad():
        model.linear.weight.add_(1)
    GATE.set()
    _wait(served)
    assert served.check.state == "unchecked"


def test_a_model_with_state_is_looked_at_at_once(cache):
    model, x = Caches().eval(), torch.randn(1, 4)
    cold = _compile(cache, model, x)
    assert {bound.name for bound in cold.artifact.check.bounds} == {
        "output",
        "buffer:cache",
        "buffer:position",
    }
    served = _compile(cache, model, x, check="background")
    assert (served.cache_hit, served.check.state) == ("direct", "agreed")
    assert model.position.item() == 0
    assert torch.equal(model.cache, torch.zeros(8, 4))
    eager = Caches().eval()
    for _ in range(3):
        y = torch.randn(1, 4)
        torch.testing.assert_close(served(y), eager(y))
    torch.testing.assert_close(model.cache, eager.cache)


def test_a_hit_that_writes_another_buffer_is_refused(cache):
    model, other, x = Caches().eval(), Misplaces().eval(), torch.randn(1, 4)
    _, _, right = _wrong_hit(cache, model, x, other)
    served = _compile(cache, model, x)
    assert served.graph_hash == right.graph_hash
    assert "buffer:cache" in served.explain().reason
    assert torch.equal(model.cache, torch.zeros(8, 4))
    assert model.position.item() == 0


def test_a_forward_that_asks_whether_it_is_traced(cache):
    model, x = Asks().eval(), torch.randn(2, 4)
    with pytest.raises(ModelMismatchError, match=r"blocks\.0") as raised:
        _compile(cache, model, x)
    assert isinstance(raised.value, CaptureError)
    assert raised.value.output == "output['hidden']"
    assert raised.value.module == "blocks.0 (Block)"
    assert raised.value.difference > 0
    assert not cache.entries()
    assert _compile(cache, model, x, check="none").check.state == "unchecked"
    # What nobody looked at is looked at by the next start that does.
    with pytest.raises(ModelMismatchError):
        _compile(cache, model, x)


def test_a_model_that_fails_on_its_example_is_not_what_was_captured(cache):
    with pytest.raises(ModelMismatchError, match="only when it is traced"):
        _compile(cache, Fails().eval(), torch.ones(2))


@pytest.mark.parametrize("check", ["example", "none"])
def test_an_example_of_another_dtype_is_named(cache, check):
    with pytest.raises(CaptureError, match=r"Linear cannot run on its example.*same dtype"):
        _compile(cache, torch.nn.Linear(4, 4).eval(), torch.ones(2, 4).double(), check=check)
    assert not cache.entries()


@pytest.mark.parametrize("check", ["example", "none"])
def test_an_example_that_the_forward_turns_is_left_as_it_was(cache, check):
    x = torch.arange(6.0).reshape(2, 3)
    assert _compile(cache, Turns().eval(), x, check=check)(x.clone()).shape == (3, 2)
    assert (x.shape, x.stride()) == ((2, 3), (3, 1))


def test_pieces_that_disagree_together_are_told_from_the_graph(cache, monkeypatch):
    from stitchcache.runtime.model import CompiledModel

    bound = CompiledModel._bound_to

    def off(self, model):
        call, *more = bound(self, model)
        return lambda *args, **kwargs: {k: v + 1 for k, v in call(*args, **kwargs).items()}, *more

    monkeypatch.setattr(CompiledModel, "_bound_to", off)
    with pytest.raises(PieceMismatchError, match="but its graph, run op by op, does not"):
        _compile(cache, Plain().eval(), torch.randn(2, 4))
    assert not cache.entries()


def test_an_entry_without_weights_is_looked_at_by_the_first_start_that_has_them(cache):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        bare, y = Plain().eval(), torch.randn(2, 4)
    cold = _compile(cache, bare, y)
    assert cold.check.state == "unchecked"
    assert "no data" in cold.artifact.check.reason
    model, x = Plain().eval(), torch.randn(2, 4)
    warm = _compile(cache, model, x)
    assert warm.graph_hash == cold.graph_hash
    assert (warm.cache_hit, warm.check.state) == ("direct", "agreed")
    assert cache.get(warm.graph_hash).check.state == "compared"


def test_random_numbers_are_the_same_on_both_sides(cache):
    model, x = Noisy().eval(), torch.zeros(3)
    assert _compile(cache, model, x).check.state == "agreed"
    state = torch.get_rng_state()
    warm = _compile(cache, model, x)
    assert (warm.cache_hit, warm.check.state) == ("direct", "agreed")
    assert torch.equal(torch.get_rng_state(), state)
    served = _compile(cache, model, x, check="background")
    _wait(served)
    assert served.check.state == "unchecked"
    assert "random" in served.check.reason


def test_an_op_that_writes_elsewhere_is_named_by_the_user(cache):
    model, x = models.decoder(), models.ids()
    options = models.decoder_options(options={"stitchcache.effects": {models.ATTENTION: True}})
    compiled = stitchcache.compile(model, (x,), cache=cache, **options)
    assert compiled.check.state == "unchecked"
    assert models.ATTENTION in compiled.check.reason
    assert models.ATTENTION in stitchcache.compile(model, (x,), cache=cache, **options).check.reason
    # In no key: who does not name it is compared.
    assert stitchcache.compile(model, (x,), cache=cache, **models.decoder_options()).check.state == "agreed"


@pytest.mark.parametrize("effects", [{"attention": True}, {"a::b": 1}, {1: True}])
def test_effects_that_make_no_sense(cache, effects):
    with pytest.raises(OptionError):
        _compile(cache, Plain().eval(), torch.ones(2, 4), options={"stitchcache.effects": effects})


def test_the_environment_decides_where_the_call_does_not(cache, monkeypatch):
    model, x = Plain().eval(), torch.randn(2, 4)
    _compile(cache, model, x)
    monkeypatch.setenv("STITCHCACHE_CHECK", "none")
    assert _compile(cache, model, x).check.state == "unchecked"
    assert _compile(cache, model, x, check="example").check.state == "agreed"


def test_a_loaded_entry_says_that_nobody_looked(cache):
    model, x = Plain().eval(), torch.randn(2, 4)
    compiled = _compile(cache, model, x)
    assert stitchcache.load(compiled.graph_hash, model, cache=cache).check.state == "unchecked"


def test_verify_compares_any_callable():
    model, x = Caches().eval(), torch.randn(1, 4)
    compiled = torch.compile(model, backend="eager")
    assert stitchcache.verify(model, compiled, (x,)).state == "agreed"
    assert model.position.item() == 0
    found = stitchcache.verify(model, lambda x: model(x) + 1, (x,))
    assert (found.state, found.output) == ("mismatch", "output")
    assert (
        stitchcache.verify(model, lambda x: (), (x,)).reason
        == "the result is tuple of 0 leaves instead of one value of 1 leaves"
    )


@pytest.mark.compile
def test_compiled_pieces_round_within_what_was_measured(compiled_root):
    cache = stitchcache.Cache(compiled_root)
    model, x = models.decoder(layers=1), models.ids()
    options = models.decoder_options(backend="aoti")
    cold = stitchcache.compile(model, (x,), cache=cache, **options)
    assert cold.check.state == "agreed"
    record = stitchcache.compile(model, (x,), cache=cache, **options).artifact.check
    # Rounding within the floor is not noted: every start allows it.
    assert (record.state, record.bounds) == ("compared", ())
    # Other weights under the same graph, and other sizes.
    seeded = models.decoder(layers=1, seed=7)
    other = stitchcache.compile(seeded, (models.ids(3, 17),), cache=cache, **options)
    assert other.check.state == "agreed"


def _wait(compiled):
    for thread in threading.enumerate():
        if thread.name == "stitchcache look":
            thread.join(20)
    assert compiled.check.state != "pending"


def test_a_look_in_the_background_imports_no_more_than_the_usual_one(tmp_path, fresh_process):
    """A start with it took half a second while it imported sympy."""
    source = f"""
        import json, sys, torch, stitchcache
        model = torch.nn.Linear(3, 2).eval()
        cache = stitchcache.Cache({str(tmp_path)!r})
        made = stitchcache.compile(model, (torch.ones(3),), backend="eager", cache=cache, check="background")
        print(json.dumps([made.cache_hit, "sympy" in sys.modules]))
    """
    assert fresh_process(source)[0] is None
    assert fresh_process(source) == ["direct", False]
