"""docs/examples/serve.py without its queue and without compiling: what its start is held against."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import minilm
import prometheus_client  # noqa: F401 - as the service does
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Read the model and tokenize its example, in a thread."""
    app.state.model, _, _ = await asyncio.to_thread(minilm.build)
    yield


async def embed(request: Request) -> Response:
    """As the service answers."""
    asked: Any = await request.json()
    vectors = await asyncio.to_thread(minilm.embed, request.app.state.model, asked["sentences"])
    return JSONResponse({"vectors": vectors.tolist()})


async def ready(request: Request) -> Response:
    """Likewise."""
    return JSONResponse({"ready": True, "hit": "eager", "worker": os.getpid()})


app = Starlette(lifespan=lifespan, routes=[Route("/embed", embed, methods=["POST"]), Route("/ready", ready)])
