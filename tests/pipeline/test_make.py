"""Seconds left: from this run's pieces, else from what the store has seen, else unknown."""

from __future__ import annotations

import pytest

import stitchcache
from stitchcache.cli.output import left_text
from stitchcache.pipeline.make import Estimate


def test_nothing_is_known_at_first_and_then_what_was_seen(tmp_path):
    cache = stitchcache.Cache(tmp_path)
    first = Estimate(cache, "aoti", rounds=2)
    assert first.left() is None
    first.took("eager", 500.0)
    assert first.left() is None, "an eager piece says nothing about a compiled one"
    first.took("aoti", 100.0)
    assert first.left() == pytest.approx(200, abs=1), "two rounds of 100 s, just begun"
    first.took("aoti", 300.0)
    assert first.left() == pytest.approx(400, abs=1)
    assert [cache.counted().get(f"piece.compiled.{name}", 0) for name in ("aoti", "eager", "inductor")] == [
        2,
        1,
        0,
    ]
    assert Estimate(cache, "aoti", rounds=1).left() == pytest.approx(200, abs=1)
    assert Estimate(cache, "inductor", rounds=1).left() is None


def test_what_takes_longer_than_expected_has_no_estimate(tmp_path):
    estimate = Estimate(stitchcache.Cache(tmp_path), "aoti", rounds=1)
    estimate.took("aoti", 0.0)
    assert estimate.left() is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "about 1 s left"), (7.4, "about 7 s left"), (23, "about 25 s left"), (200, "about 3 min left")],
)
def test_an_estimate_is_no_finer_than_it_is(seconds, said):
    assert left_text(seconds) == said
