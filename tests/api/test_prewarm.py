"""Targets: found by reference, compiled in turn, one failure stops no other."""

from __future__ import annotations

import models
import pytest
import torch

import stitchcache
from stitchcache import errors
from stitchcache.api.prewarm import find_targets

SOURCE = """
import torch, stitchcache

def build():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 3).eval(), (torch.ones(2, 3),)

target = stitchcache.Target("linear", build, backend="eager")
both = [target, stitchcache.Target("again", build, backend="eager")]
def make():
    return both
number = 3
mixed = [target, 4]
"""


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path / "cache")


@pytest.fixture
def module(tmp_path):
    path = tmp_path / f"targets_{tmp_path.name.replace('-', '_')}.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "found"), [("target", ["linear"]), ("both", ["linear", "again"]), ("make", ["linear", "again"])]
)
def test_references(module, name, found, monkeypatch):
    assert [t.name for t in find_targets(f"{module}:{name}")] == found
    monkeypatch.syspath_prepend(module.parent)
    assert [t.name for t in find_targets(f"{module.stem}:{name}")] == found


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        ("{file}", errors.TargetNotFoundError, "pkg.module:name"),
        ("{file}:nope", errors.TargetNotFoundError, "has no 'nope'.*target"),
        ("{file}:number", errors.TargetError, "int"),
        ("{file}:mixed", errors.TargetError, "int"),
        ("missing/file.py:target", errors.TargetNotFoundError, "no file"),
        ("no_such_package.module:target", errors.TargetNotFoundError, "no_such_package"),
    ],
)
def test_references_that_lead_nowhere(module, reference, error, words):
    with pytest.raises(error, match=words):
        find_targets(reference.format(file=module))


def test_a_module_that_fails_to_import(tmp_path):
    (tmp_path / "broken_target.py").write_text("import no_such_dependency\n")
    with pytest.raises(errors.TargetError, match="no_such_dependency"):
        find_targets(f"{tmp_path / 'broken_target.py'}:target")


def test_report(cache, module):
    seen = []
    report = stitchcache.prewarm([f"{module}:target"], cache=cache, on_progress=seen.append)
    (result,) = report.results
    assert report.ok
    assert (result.name, result.status, result.pieces, result.distinct) == ("linear", "compiled", 1, 1)
    assert result.blob_bytes > 0
    assert [p.stage for p in seen if p.stage != "compile"] == ["lookup", "capture", "store", "done"]
    (again,) = stitchcache.prewarm(f"{module}:target", cache=cache).results
    assert again.status == "direct"
    assert again.graph_hash == result.graph_hash


def test_one_failure_stops_no_other(cache):
    def good():
        return models.decoder(), (models.ids(),)

    def bad():
        return models.Branch().eval(), (torch.ones(2),)

    report = stitchcache.prewarm(
        [
            stitchcache.Target("bad", bad, backend="eager"),
            stitchcache.Target("odd", lambda: 3, backend="eager"),
            stitchcache.Target("good", good, **models.decoder_options()),
        ],
        cache=cache,
    )
    assert [r.status for r in report.results] == ["failed", "failed", "compiled"]
    assert isinstance(report.results[0].error, errors.CaptureError)
    assert isinstance(report.results[1].error, errors.TargetError)
    assert not report.ok


class CorruptWeights(Exception):
    """As a reader of weights raises it: it derives from nothing but Exception."""


@pytest.mark.parametrize(
    "error", [CorruptWeights("checksum"), MemoryError(), StopIteration(), RecursionError("deep"), EOFError()]
)
def test_whatever_build_raises_stops_no_other(cache, error):
    def bad():
        raise error

    def good():
        return torch.nn.Linear(3, 3).eval(), (torch.ones(2, 3),)

    targets = [stitchcache.Target(name, build, backend="eager") for name, build in (("a", bad), ("b", good))]
    report = stitchcache.prewarm(targets, cache=cache)
    assert [result.status for result in report.results] == ["failed", "compiled"]
    told = report.failed[0].error
    assert isinstance(told, errors.TargetError)
    assert told.target == "a"
    assert type(error).__name__ in str(told)
    assert told.__cause__ is error


def test_an_interrupt_is_no_failure_of_a_target(cache):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stitchcache.prewarm(stitchcache.Target("a", interrupted, backend="eager"), cache=cache)


def test_no_jobs_at_all(cache):
    def build():
        pytest.fail("refused before anything is built")

    with pytest.raises(errors.OptionError, match="jobs=0"):
        stitchcache.prewarm(stitchcache.Target("a", build, backend="eager"), jobs=0, cache=cache)


def test_two_targets_of_one_name(cache):
    target = stitchcache.Target("same", models.decoder)
    with pytest.raises(errors.DuplicateTargetError, match="same"):
        stitchcache.prewarm([target, stitchcache.Target("same", models.decoder)], cache=cache)


def test_load_by_prefix(cache):
    model = models.decoder()
    compiled = stitchcache.compile(model, (models.ids(),), cache=cache, **models.decoder_options())
    loaded = stitchcache.load(compiled.graph_hash[:10], models.decoder(), cache=cache)
    torch.testing.assert_close(loaded(models.ids(3, 9)), model(models.ids(3, 9)))
    with pytest.raises(errors.GraphHashError, match="ffff"):
        stitchcache.load("ffff", model, cache=cache)
    other = models.decoder()
    other.layers[0].norm.eps = 0.1
    with pytest.raises(errors.BindError, match=r"model\."):
        stitchcache.load(compiled.graph_hash, other, cache=cache)


def test_a_prefix_that_two_entries_share(cache):
    hashes = {}
    for width in range(1, 40):
        compiled = stitchcache.compile(
            torch.nn.Linear(width, 1).eval(), (torch.ones(1, width),), backend="eager", cache=cache
        )
        first = compiled.graph_hash[0]
        if first in hashes:
            with pytest.raises(errors.AmbiguousPrefixError) as caught:
                stitchcache.load(first, torch.nn.Linear(width, 1), cache=cache)
            assert {hashes[first], compiled.graph_hash} <= set(caught.value.candidates)
            return
        hashes[first] = compiled.graph_hash
    pytest.fail("39 hashes with 16 first digits, and no two the same")


def test_a_module_that_raises_is_an_error_with_its_place(tmp_path):
    (tmp_path / "raising_target.py").write_text("import json\nraise KeyError('weights')\n")
    with pytest.raises(errors.TargetError, match=r"KeyError: 'weights' \(.*raising_target.py:2\)"):
        find_targets(f"{tmp_path / 'raising_target.py'}:target")
    with pytest.raises(errors.TargetError, match=r"dumps\(\) of json is to return targets"):
        find_targets("json:dumps")
    (tmp_path / "needing_target.py").write_text("\nfrom json import nothing\n")
    with pytest.raises(errors.TargetError, match=r"needing_target.py:2"):
        find_targets(f"{tmp_path / 'needing_target.py'}:target")


class Broken(torch.nn.Module):
    """Two graphs of Dynamo's: a graph break between them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x):
        x = self.one(x)
        torch._dynamo.graph_break()
        return self.two(x).relu()


def test_targets_that_torch_compile_captures(cache):
    def build():
        torch.manual_seed(0)
        return Broken().eval(), (torch.ones(2, 3),)

    target = stitchcache.Target("broken", build, backend="eager", torch_compile={"dynamic": True})
    (cold,) = stitchcache.prewarm(target, cache=cache).results
    assert (cold.status, cold.stored, len(cold.more_graphs), cold.pieces) == ("compiled", True, 1, 2)
    torch._dynamo.reset()
    (warm,) = stitchcache.prewarm(target, cache=cache, on_miss="error").results
    assert (warm.status, warm.graph_hash, warm.more_graphs) == ("graph", cold.graph_hash, cold.more_graphs)
    # What the target is for: the program's own torch.compile finds all of it.
    torch._dynamo.reset()
    model, _ = build()
    options = {"backend": "eager", "cache": cache, "on_miss": "error"}
    fast = torch.compile(model, backend="stitchcache", dynamic=True, options=options)
    with torch.no_grad():
        torch.testing.assert_close(fast(torch.ones(5, 3)), model(torch.ones(5, 3)))
    torch._dynamo.reset()
    (missed,) = stitchcache.prewarm(
        target, cache=stitchcache.Cache(cache.root / "x"), on_miss="error"
    ).results
    assert isinstance(missed.error, errors.CacheMissError)
    with pytest.raises(errors.OptionError, match="dynamic_shapes"):
        stitchcache.Target("a", build, dynamic_shapes=(None,), torch_compile={})
    (faked,) = stitchcache.prewarm(target, cache=cache, fake=True).results
    assert "needs real weights" in str(faked.error)
