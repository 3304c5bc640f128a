"""compile(): hits, misses, bindings, errors; with the eager backend, so that it is about the road."""

from __future__ import annotations

import logging
import threading

import models
import pytest
import torch

import stitchcache
from stitchcache import errors


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path / "cache")


def compiled_decoder(cache, model=None, **more):
    return stitchcache.compile(
        model or models.decoder(), (models.ids(),), cache=cache, **models.decoder_options(**more)
    )


def test_equals_eager_at_every_allowed_size(cache):
    model = models.decoder()
    compiled = compiled_decoder(cache, model)
    assert compiled.cache_hit is None
    for batch, length in [(1, 2), (2, 8), (3, 5), (16, 64)]:
        x = models.ids(batch, length)
        torch.testing.assert_close(compiled(x), model(x))


def test_second_call_hits_directly_and_says_so(cache, caplog):
    compiled_decoder(cache)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="stitchcache"):
        again = compiled_decoder(cache)
    assert again.cache_hit == "direct"
    assert set(again.timings) >= {"key", "sources", "load", "link", "total"}
    (line,) = [record.message for record in caplog.records]
    assert "direct hit" in line
    assert again.graph_hash[:12] in line


def test_a_fresh_process_hits_directly_without_dynamo(cache, fresh_process):
    expected = compiled_decoder(cache)(models.ids(3, 5))
    result = fresh_process(
        f"""
        import json, sys, torch, models, stitchcache
        before = set(sys.modules)
        model = models.decoder()
        compiled = stitchcache.compile(
            model, (models.ids(),), cache=stitchcache.Cache({str(cache.root)!r}), **models.decoder_options())
        y = compiled(models.ids(3, 5))
        print(json.dumps(dict(hit=compiled.cache_hit, why=str(compiled.explain()), y=y.flatten().tolist(),
              ours=sorted({{"torch._dynamo", "torch._inductor", "sympy"}} & (set(sys.modules) - before)))))
        """
    )
    assert result["hit"] == "direct", result["why"]
    assert result["ours"] == []
    torch.testing.assert_close(torch.tensor(result["y"]), expected.detach().flatten())


def test_layers_share_pieces(cache):
    few = compiled_decoder(cache, models.decoder(4))
    many = compiled_decoder(cache, models.decoder(8))
    assert len(many.artifact.pieces) == 9
    assert {p.key for p in many.artifact.pieces} == {p.key for p in few.artifact.pieces}
    assert len({p.key for p in many.artifact.pieces}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"key_factors": {"release": 2}},
        {"splitting_ops": []},
        {"dynamic_shapes": ({0: stitchcache.Dim("batch", 1, 8), 1: stitchcache.Dim("length", 2, 64)},)},
        {"dynamic_shapes": None},
    ],
)
def test_an_option_is_part_of_the_key(cache, change):
    first = compiled_decoder(cache)
    other = compiled_decoder(cache, **change)
    assert other.cache_hit is None
    assert other.graph_hash != first.graph_hash


def test_another_attribute_is_a_miss_and_another_weight_is_not(cache):
    compiled_decoder(cache)
    scaled = models.decoder()
    scaled.layers[1].norm.eps = 0.5
    other = compiled_decoder(cache, scaled)
    assert other.cache_hit is None
    torch.testing.assert_close(other(models.ids()), scaled(models.ids()))
    reseeded = models.decoder(seed=7)
    same = compiled_decoder(cache, reseeded)
    assert same.cache_hit == "direct"
    torch.testing.assert_close(same(models.ids()), reseeded(models.ids()))


def test_weights_are_bound_by_reference(cache):
    model = models.decoder()
    compiled = compiled_decoder(cache, model)
    with torch.no_grad():
        model.head.weight.mul_(3)
    torch.testing.assert_close(compiled(models.ids()), model(models.ids()))
    model.head.weight = torch.nn.Parameter(torch.randn_like(model.head.weight))
    assert not torch.allclose(compiled(models.ids()), model(models.ids()))
    compiled.rebind(model)
    torch.testing.assert_close(compiled(models.ids()), model(models.ids()))


def test_rebind_refuses_what_does_not_fit_and_keeps_the_old(cache):
    model = models.decoder()
    compiled = compiled_decoder(cache, model)
    wrong = models.Decoder(width=32).eval()
    with pytest.raises(errors.BindError, match="shape") as caught:
        compiled.rebind(wrong)
    assert caught.value.name
    torch.testing.assert_close(compiled(models.ids()), model(models.ids()))


def test_tied_weights_must_stay_tied(cache):
    model = models.Tied().eval()
    x = torch.tensor([[1, 2, 3]])
    compiled = stitchcache.compile(model, (x,), backend="eager", cache=cache)
    torch.testing.assert_close(compiled(x), model(x))
    untied = models.Tied().eval()
    untied.head.weight = torch.nn.Parameter(untied.embed.weight.detach().clone() + 1)
    with pytest.raises(errors.BindError, match="one tensor"):
        compiled.rebind(untied)
    again = stitchcache.compile(untied, (x,), backend="eager", cache=cache)
    torch.testing.assert_close(again(x), untied(x))


def test_nested_arguments_and_results(cache):
    model = models.Pair().eval()
    args = (torch.randn(3, 4), {"bias": torch.randn(4)})
    compiled = stitchcache.compile(
        model, args, {"factor": 3, "mask": torch.ones(4)}, backend="eager", cache=cache
    )
    call = (torch.randn(3, 4), {"bias": torch.randn(4)})
    got, want = compiled(*call, factor=3, mask=torch.ones(4)), model(*call, factor=3, mask=torch.ones(4))
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(want)
    torch.testing.assert_close(got["y"], want["y"])
    assert got["rest"][1][1:] == (None, 7)


def test_buffers_are_written_back(cache):
    ours, eager = models.Counter().eval(), models.Counter().eval()
    x = torch.randn(5, 3)
    compiled = stitchcache.compile(ours, (x,), backend="eager", cache=cache)
    assert ours.calls.item() == 0, "compiling must not touch the model"
    for step in range(3):
        x = torch.randn(5, 3)
        torch.testing.assert_close(compiled(x), eager(x))
        assert ours.calls.item() == eager.calls.item() == step + 1
        torch.testing.assert_close(ours.mean, eager.mean)


def test_arguments_may_move_between_positions_and_keywords(cache):
    model = models.decoder()
    compiled = compiled_decoder(cache, model)
    torch.testing.assert_close(compiled(ids=models.ids()), model(models.ids()))


def test_calls_ignore_grad_mode_and_autocast(cache):
    compiled = compiled_decoder(cache)
    want = compiled(models.ids())
    assert not want.requires_grad
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        got = compiled(models.ids())
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want)


def test_threads_may_call_at_once(cache):
    model = models.decoder()
    compiled = compiled_decoder(cache, model)
    inputs = [models.ids(b, 9) for b in range(1, 9)]
    wanted = [model(x) for x in inputs]
    failures = []

    def work(x, want):
        for _ in range(10):
            if not torch.allclose(compiled(x), want, atol=1e-5):
                failures.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_miss_can_be_an_error(cache, monkeypatch):
    with pytest.raises(errors.CacheMissError, match="prewarm") as caught:
        compiled_decoder(cache, on_miss="error")
    assert caught.value.target == "Decoder"
    assert caught.value.reason
    monkeypatch.setenv("STITCHCACHE_REQUIRE", "1")
    with pytest.raises(errors.CacheMissError):
        compiled_decoder(cache)
    monkeypatch.delenv("STITCHCACHE_REQUIRE")
    compiled_decoder(cache)
    assert compiled_decoder(cache, on_miss="error").cache_hit == "direct"


def test_a_changed_source_file_is_no_direct_hit(tmp_path, fresh_process):
    """The graph decides then: a comment leads to the same graph, another constant does not."""
    (tmp_path / "edited.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\n"
    )
    source = f"""
        import json, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch, edited, stitchcache
        model = edited.Net().eval()
        x = torch.ones(3)
        cache = stitchcache.Cache({str(tmp_path / "c")!r})
        compiled = stitchcache.compile(model, (x,), backend="eager", cache=cache)
        print(json.dumps(dict(hit=compiled.cache_hit, y=compiled(x).tolist(), graph=compiled.graph_hash)))
    """
    first = fresh_process(source)
    second = fresh_process(source)
    (tmp_path / "edited.py").write_text((tmp_path / "edited.py").read_text() + "# a comment\n")
    commented = fresh_process(source)
    (tmp_path / "edited.py").write_text((tmp_path / "edited.py").read_text().replace("x * 2", "x * 3"))
    changed = fresh_process(source)
    assert [r["hit"] for r in (first, second, commented, changed)] == [None, "direct", "graph", None]
    assert [r["y"][0] for r in (first, second, commented, changed)] == [2, 2, 2, 3]
    assert first["graph"] == commented["graph"] != changed["graph"]


def test_size_ranges_have_pieces_of_their_own(cache):
    model = models.decoder()
    ranges = [stitchcache.SizeRange(1, 1, "batch"), stitchcache.SizeRange(2, 8, "batch")]
    compiled = compiled_decoder(cache, model, size_ranges=ranges)
    assert [str(v.size_range) for v in compiled.artifact.variants] == ["1", "2..8"]
    for batch in (1, 2, 8):
        torch.testing.assert_close(compiled(models.ids(batch, 5)), model(models.ids(batch, 5)))
    with pytest.raises(errors.InputMismatchError, match=r"1, 2\.\.8, got 9"):
        compiled(models.ids(9, 5))


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(1, 8, "batch"), (8, 9, "batch")], "overlap"),
        ([(1, 99, "batch")], "leaves"),
        ([(1, 8, None)], "say which one"),
        ([(1, 8, "nope")], "batch, length"),
    ],
)
def test_size_ranges_that_make_no_sense(cache, ranges, words):
    with pytest.raises(errors.OptionError, match=words):
        compiled_decoder(cache, size_ranges=[stitchcache.SizeRange(*r) for r in ranges])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"backend": "tensorrt"}, errors.OptionError, "aoti, inductor, eager"),
        ({"on_miss": "shrug"}, errors.OptionError, "on_miss"),
        ({"splitting_ops": ["mylib::nope"]}, errors.SplittingOpNotFoundError, "mylib::nope.*aten::"),
        ({"splitting_ops": [3]}, errors.OptionError, "splitting_ops"),
        ({"options": {"stitchcache.jobs": "two"}}, errors.OptionError, "stitchcache.jobs"),
        ({"options": {"stitchcache.nope": 1}}, errors.OptionError, "stitchcache.nope"),
    ],
)
def test_options_that_make_no_sense(cache, change, error, words):
    with pytest.raises(error, match=words):
        compiled_decoder(cache, **change)
    assert list(cache.entries()) == []


def test_a_path_is_no_cache(cache):
    path = str(cache.root)
    options = models.decoder_options(cache=path)
    with pytest.raises(errors.OptionError, match=r"Cache\(\.\.\.\)"):
        stitchcache.compile(models.decoder(), (models.ids(),), **options)
    options["cache"] = None
    preloaded = stitchcache.preload(cache=path)
    with pytest.raises(errors.OptionError, match=r"Cache\(\.\.\.\)"):
        stitchcache.compile(models.decoder(), (models.ids(),), preloaded=preloaded, **options)
    with pytest.raises(errors.OptionError, match=r"Cache\(\.\.\.\)"):
        stitchcache.load("0" * 64, models.decoder(), cache=path)
    with pytest.raises(errors.OptionError, match=r"Cache\(\.\.\.\)"):
        stitchcache.prewarm([], cache=path)


def test_models_that_cannot_be_compiled(cache):
    x = torch.ones(3)
    with pytest.raises(errors.OptionError, match=r"eval\(\)"):
        stitchcache.compile(torch.nn.Linear(3, 3).train(), (x,), cache=cache)
    with pytest.raises(errors.OptionError, match="Module"):
        stitchcache.compile(lambda x: x, (x,), cache=cache)
    with pytest.raises(errors.OptionError, match="tuple"):
        stitchcache.compile(torch.nn.Linear(3, 3).eval(), x, cache=cache)
    with pytest.raises(errors.CaptureError, match=r"models\.py:\d+") as caught:
        stitchcache.compile(models.Branch().eval(), (x,), backend="eager", cache=cache)
    assert caught.value.reason
    assert list(cache.entries()) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: (torch.zeros(2, 8, dtype=torch.int32),), "ids: expected dtype int64"),
        (lambda: (torch.zeros(8, dtype=torch.int64),), "ids: expected rank 2"),
        (
            lambda: (torch.zeros(17, 8, dtype=torch.int64),),
            r"ids.shape\[0\]: expected a size in 1..16, got 17",
        ),
        (lambda: (torch.zeros(2, 1, dtype=torch.int64),), r"ids.shape\[1\]: expected a size in 2..64, got 1"),
        (lambda: (torch.zeros(8, 2, dtype=torch.int64).t(),), "ids: expected strides"),
        (lambda: (torch.zeros(2, 8, dtype=torch.int64, device="meta"),), "ids: expected device cpu"),
        (lambda: ([[1, 2]],), "ids"),
        (lambda: (), "missing"),
        (lambda: (models.ids(), models.ids()), "too many"),
    ],
)
def test_calls_that_the_capture_does_not_cover(cache, call, words):
    compiled = compiled_decoder(cache)
    with pytest.raises(errors.InputMismatchError, match=words):
        compiled(*call())
    torch.testing.assert_close(compiled(models.ids()), models.decoder()(models.ids()))


def test_a_static_size_and_a_baked_value_are_checked(cache):
    model = models.Pair().eval()
    x, batch = torch.randn(3, 4), {"bias": torch.randn(4)}
    compiled = stitchcache.compile(model, (x, batch), {"factor": 3}, backend="eager", cache=cache)
    with pytest.raises(errors.InputMismatchError, match=r"x.shape\[0\]: expected 3, got 2.*dynamic_shapes"):
        compiled(x[:2], batch, factor=3)
    with pytest.raises(errors.InputMismatchError, match="factor: expected 3, got 4"):
        compiled(x, batch, factor=4)
    with pytest.raises(errors.InputMismatchError, match=r"factor: expected 3, got 3\.0"):
        compiled(x, batch, factor=3.0)
    with pytest.raises(errors.InputMismatchError):
        compiled(x, {"bias": batch["bias"], "more": x}, factor=3)
    with pytest.raises(errors.InputMismatchError, match="mask"):
        compiled(x, batch, factor=3, mask=torch.ones(4))
