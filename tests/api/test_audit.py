"""``STITCHCACHE_AUDIT``: a direct hit that is wrong is found out, and not served."""

from __future__ import annotations

import dataclasses
import decimal
import logging
import pickle

import pytest
import torch
from explain_models import Third, Twice

import stitchcache
from stitchcache import errors


def compiled(cache, model, check="none"):
    """Without a look: an audit is about keys, and finds by itself what they miss."""
    return stitchcache.compile(model.eval(), (torch.ones(3),), backend="eager", cache=cache, check=check)


@pytest.fixture
def cache(tmp_path):
    return stitchcache.Cache(tmp_path)


def test_a_right_hit_is_served_and_said(cache, monkeypatch, caplog):
    compiled(cache, Third())
    monkeypatch.setenv("STITCHCACHE_AUDIT", "1")
    with caplog.at_level(logging.INFO, logger="stitchcache"):
        again = compiled(cache, Third())
    assert again.cache_hit == "direct"
    assert "capture" in again.timings
    audited, served = [record.message for record in caplog.records if record.name == "stitchcache"]
    assert audited == f"Third: audit: the graph is {again.graph_hash[:12]} as the key says"
    assert served.startswith(f"Third: direct hit {again.graph_hash[:12]}")
    assert cache.stats().counters["audit.right"] == 1


def lead_elsewhere(cache, compiled_model, graph_hash):
    """What would be so if a model depended on something that no key sees."""
    key = compiled_model.explain().target_key
    cache.put_target(key, dataclasses.replace(cache.get_target(key)[0], graph_hash=graph_hash))
    return cache.root / "targets" / key[:2] / key


def test_a_stale_hit_is_an_error_and_nothing_is_served(cache, monkeypatch):
    right, wrong = compiled(cache, Third()), compiled(cache, Twice())
    path = lead_elsewhere(cache, right, wrong.graph_hash)
    assert compiled(cache, Third()).cache_hit == "direct", "this is what audits are for"
    monkeypatch.setenv("STITCHCACHE_AUDIT", "1")
    with pytest.raises(errors.StaleEntryError) as caught:
        compiled(cache, Third())
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.expected, error.actual) == (wrong.graph_hash, right.graph_hash)
    assert "graph.pieces" in error.differences
    for word in (error.expected[:12], error.actual[:12], "graph.pieces", "key_factors", "Third", str(path)):
        assert word in str(error)
    counters = cache.stats().counters
    assert counters["audit.wrong"] == 1
    assert counters["hit.direct"] == 1, "only the one that was served"


def test_the_look_finds_the_same_without_a_trace(cache, caplog):
    right, wrong = compiled(cache, Third()), compiled(cache, Twice())
    lead_elsewhere(cache, right, wrong.graph_hash)
    again = compiled(cache, Third(), check="example")
    assert (again.cache_hit, again.graph_hash) == ("graph", right.graph_hash)
    (warned,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert wrong.graph_hash[:12] in warned
    assert compiled(cache, Third(), check="example").cache_hit == "direct", "the trace has mended the record"


def test_the_precision_of_decimals_is_a_factor(cache):
    first = compiled(cache, Third())
    with decimal.localcontext() as context:
        context.prec = 2
        again = compiled(cache, Third())
        assert again.cache_hit is None
        assert again.graph_hash != first.graph_hash
        assert "code.decimal" in again.explain().nearest.differences
    assert compiled(cache, Third()).cache_hit == "direct"


def test_a_setting_that_makes_no_sense(cache, monkeypatch):
    compiled(cache, Twice())
    monkeypatch.setenv("STITCHCACHE_AUDIT", "perhaps")
    with pytest.raises(errors.OptionError, match="STITCHCACHE_AUDIT"):
        compiled(cache, Twice())


def test_so_is_what_threads_begin_with(cache):
    """A changed template makes every new context unusual, and must not make it look usual."""
    first = compiled(cache, Third())
    before, template = decimal.getcontext().copy(), decimal.DefaultContext.prec
    try:
        decimal.DefaultContext.prec = 5
        decimal.setcontext(decimal.DefaultContext.copy())
        assert compiled(cache, Third()).graph_hash != first.graph_hash
    finally:
        decimal.DefaultContext.prec = template
        decimal.setcontext(before)
