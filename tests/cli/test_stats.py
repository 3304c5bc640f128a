"""``stitchcache stats`` after real compilations."""

from __future__ import annotations

import gc

import pytest
import torch

import stitchcache


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A cache in which one model was compiled, loaded directly, and loaded by its graph."""
    root = tmp_path_factory.mktemp("used")
    root.chmod(0o755)
    model, inputs = torch.nn.Linear(3, 3).eval(), (torch.ones(2, 3),)
    hits = []
    for factors in ({}, {}, {}):
        compiled = stitchcache.compile(
            model, inputs, backend="eager", cache=stitchcache.Cache(root), key_factors=factors
        )
        hits.append(compiled.cache_hit)
        if len(hits) == 2:
            for path in (root / "targets").rglob("*"):
                if path.is_file():
                    path.unlink()
    gc.collect()
    assert hits == [None, "direct", "graph"]
    return root


def test_what_was_counted(run_cli, used):
    counters = run_cli("stats", "--json", "--cache", used).json["counters"]
    assert {name: counters[name] for name in ("compiled", "hit.direct", "hit.graph", "miss.new", "put")} == {
        "compiled": 1,
        "hit.direct": 1,
        "hit.graph": 1,
        "miss.new": 2,
        "put": 1,
    }
    assert counters["put.bytes"] > 0
    assert counters["microseconds.spent"] > 0
    assert "microseconds.saved" in counters


def test_text_has_the_names_of_json(run_cli, used):
    out = run_cli("stats", "--cache", used).out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in ("hit.direct 1", "hit.graph 1", "compiled 1", "put 1"):
        assert line in lines
    assert any(line.startswith("seconds.spent ") and line.endswith("s") for line in lines)
    assert "microseconds" not in out
