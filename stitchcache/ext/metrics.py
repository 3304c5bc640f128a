"""Prometheus metrics of compiled models (``pip install 'stitchcache[metrics]'``).

What a dashboard of a service needs: how each start went, how long its stages took, calls, and calls that did
not fit what was captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from stitchcache.errors import InputMismatchError
from stitchcache.runtime.model import CompiledModel

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counts starts and calls of compiled models.

    Args:
        registry: Where the metrics are registered. One registry takes one ``Metrics``.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.starts = Counter(
            "stitchcache_starts",
            "Starts by kind: direct, graph, or miss if the model was compiled.",
            ["model", "hit"],
            registry=registry,
        )
        self.stages = Gauge(
            "stitchcache_start_seconds",
            "Seconds of the last start by stage.",
            ["model", "stage"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.calls = Histogram(
            "stitchcache_call_seconds",
            "Seconds of a call, on the host's clock.",
            ["model"],
            registry=registry,
            buckets=_BUCKETS,
        )
        self.mismatches = Counter(
            "stitchcache_mismatches",
            "Calls refused as they do not fit what was captured, by the argument that does not.",
            ["model", "argument"],
            registry=registry,
        )

    def watch(self, compiled: CompiledModel, model: str) -> Callable[..., Any]:
        """Count a start, and every call from now on.

        Args:
            compiled: A model that ``compile`` or ``load`` returned.
            model: What the label ``model`` says.

        Returns:
            To be called in place of the compiled model. It raises what the model raises.
        """
        self.starts.labels(model, compiled.cache_hit or "miss").inc()
        for stage, seconds in compiled.timings.items():
            self.stages.labels(model, stage).set(seconds)
        time = self.calls.labels(model).time

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                with time():
                    return compiled(*args, **kwargs)
            except InputMismatchError as error:
                # The name alone: what follows it is made of sizes, and would make a series for each.
                argument = error.argument.partition(".")[0].partition("[")[0]
                self.mismatches.labels(model, argument).inc()
                raise

        return call
