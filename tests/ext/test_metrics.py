"""Metrics of starts and calls, as Prometheus reads them."""

from __future__ import annotations

import pytest
import torch

import stitchcache
from stitchcache.errors import InputMismatchError

prometheus_client = pytest.importorskip("prometheus_client")


@pytest.fixture
def metrics():
    from stitchcache.ext.metrics import Metrics

    registry = prometheus_client.CollectorRegistry()
    return Metrics(registry), registry


def start(root):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).eval()
    cache = stitchcache.Cache(root)
    return stitchcache.compile(model, (torch.ones(2, 4),), backend="eager", cache=cache)


def test_starts_are_counted_by_kind_with_the_seconds_of_their_stages(metrics, tmp_path):
    taken, registry = metrics
    for _ in range(2):
        taken.watch(start(tmp_path), "linear")
    value = registry.get_sample_value
    assert value("stitchcache_starts_total", {"model": "linear", "hit": "miss"}) == 1
    assert value("stitchcache_starts_total", {"model": "linear", "hit": "direct"}) == 1
    assert value("stitchcache_start_seconds", {"model": "linear", "stage": "total"}) > 0


def test_calls_are_timed_and_those_that_do_not_fit_are_counted_by_argument(metrics, tmp_path):
    taken, registry = metrics
    compiled = start(tmp_path)
    call = taken.watch(compiled, "linear")
    x = torch.ones(2, 4)
    assert torch.equal(call(x), compiled(x))
    for rows in (3, 5):
        with pytest.raises(InputMismatchError):
            call(torch.ones(rows, 4))
    value = registry.get_sample_value
    assert value("stitchcache_call_seconds_count", {"model": "linear"}) == 3
    assert value("stitchcache_mismatches_total", {"model": "linear", "argument": "input"}) == 2
