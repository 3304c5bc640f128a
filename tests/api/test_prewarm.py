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
nothing = []
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
        ("{file}:nothing", errors.TargetError, "no target"),
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


# -- shards ----------------------------------------------------------------------------------------

SHARED = """
import torch
from stitchcache import Target


class Deep(torch.nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, width) for width in widths)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x[:, :8]))
        return x


def made(name, *widths):
    build = lambda: (Deep(*widths).eval(), (torch.ones(3, 8),))
    return Target(name, build, backend="eager", splitting_ops=["aten::relu"])


targets = [made("one", 8, 9, 10), made("two", 12, 9), made("three", 14, 8)]
lazy = Target("lazy", lambda: (Deep(8).eval(), (torch.ones(3, 8),)), backend="eager", torch_compile={})
"""
# What a worker does, in a process of its own.
WORKER = """
import json, stitchcache
done = stitchcache.prewarm({reference!r}, cache=stitchcache.Cache({root!r}), shard=({index}, 3))
print(json.dumps([result.status for result in done.results]))
"""


def piece_keys(root):
    return {path.name for path in root.glob("pieces/*/*")}


def compiled_here(cache):
    return cache.stats().counters.get("piece.compiled.eager", 0)


def test_shards_that_know_nothing_of_each_other_compile_each_piece_once(tmp_path, fresh_process):
    (tmp_path / "deep_targets.py").write_text(SHARED)
    reference = f"{tmp_path}/deep_targets.py:targets"
    whole = stitchcache.Cache(tmp_path / "whole")
    expected = stitchcache.prewarm(reference, cache=whole)
    assert expected.ok
    roots = [tmp_path / f"shard{index}" for index in range(3)]
    worker = WORKER.format(reference=reference, root=str(roots[0]), index=0)
    statuses = [fresh_process(worker)]
    counts = [compiled_here(stitchcache.Cache(roots[0]))]
    for index in (1, 2):
        cache = stitchcache.Cache(roots[index])
        report = stitchcache.prewarm(reference, cache=cache, shard=(index, 3))
        statuses.append([result.status for result in report.results])
        counts.append(compiled_here(cache))
        assert report.ok
    assert statuses == [["shard"] * 3] * 3
    pieces = [piece_keys(root) for root in roots]
    assert counts == list(map(len, pieces))
    assert sum(counts) == len(piece_keys(whole.root)) == compiled_here(whole)
    assert set.union(*pieces) == piece_keys(whole.root)
    assert not any((root / "entries").exists() for root in roots)
    # Their directories as layers: nothing is compiled, and the entries are those of one process.
    layers = stitchcache.Cache([tmp_path / "all", *roots])
    joined = stitchcache.prewarm(reference, cache=layers)
    assert [(r.graph_hash, r.status, r.stored) for r in joined.results] == [
        (r.graph_hash, "compiled", True) for r in expected.results
    ]
    assert compiled_here(layers) == 0
    again = stitchcache.prewarm(reference, cache=layers, shard=(1, 3))
    assert {result.status for result in again.results} == {"direct"}


def test_shards_leave_what_torch_compile_captures(tmp_path):
    (tmp_path / "lazy_targets.py").write_text(SHARED)
    (result,) = stitchcache.prewarm(f"{tmp_path}/lazy_targets.py:lazy", shard=(0, 2)).results
    assert (result.status, result.error) == ("left", None)


def test_a_shard_that_stores_nothing_has_failed(tmp_path, module):
    read_only = stitchcache.Cache(tmp_path / "cache", read_only=True)
    (result,) = stitchcache.prewarm(f"{module}:target", cache=read_only, shard=(0, 1)).failed
    assert "shard 0/1 are not stored" in result.error.message
    assert isinstance(result.error, errors.StoreWriteError)
    cache = stitchcache.Cache(tmp_path / "cache")
    (result,) = stitchcache.prewarm(f"{module}:target", cache=cache, shard=(0, 1), on_miss="error").failed
    assert isinstance(result.error, errors.CacheMissError)


@pytest.mark.parametrize(
    "shard", [(1, 1), (-1, 2), (0, 0), (0,), (0, 1, 2), ("0", 2), (True, 2), "0/2", [0, 2]]
)
def test_a_shard_that_makes_no_sense(module, shard):
    with pytest.raises(errors.OptionError, match="shard"):
        stitchcache.prewarm(f"{module}:target", shard=shard)
