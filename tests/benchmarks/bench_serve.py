"""From the start of a service to ready and to its first answer: docs/examples/serve.py beside eager.

    python tests/benchmarks/bench_serve.py [--rounds 7] [--dir DIR] [--json FILE]

One worker of uvicorn each, the two services in turn, in fresh processes, from a cache that is prewarmed
once. A worker that was killed starts like this. Prints goals; exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from goals import Goal, records, settle
from measure import HERE, FailedError, Results, say
from report import table

EXAMPLES = HERE.parents[1] / "docs" / "examples"
SERVICES = {"eager": "eager_serve:app", "stitchcache": "serve:app"}
SENTENCES = ["A cat sits on the mat.", "How long does the train take?"]
WAIT = 120.0


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="starts of each service; by default 7")
    measure.common_options(parser)
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (1 if options.quick else 7)
    options.json = options.json or Path(options.dir) / "serve.json"
    return options


def environment(directory: Path) -> dict[str, str]:
    """Of services and of the prewarm before them."""
    paths = [str(HERE.parents[1]), str(HERE), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    known = {key: value for key, value in os.environ.items() if not key.startswith("STITCHCACHE_")}
    return {
        **known,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "STITCHCACHE_DIR": str(directory / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }


def prewarm(directory: Path) -> None:
    """Compile what is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "stitchcache", "prewarm", f"{EXAMPLES / 'minilm.py'}:target"]
    subprocess.run(command, env=environment(directory), check=True, stdout=subprocess.DEVNULL)


def start(directory: Path, service: str) -> dict[str, Any]:
    """Seconds of one start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        SERVICES[service],
        "--log-level",
        "warning",
        "--port",
        str(port),
    ]
    began = time.monotonic()
    process = subprocess.Popen(command, env={**environment(directory), "STITCHCACHE_REQUIRE": "direct"})
    try:
        hit = answer(process, port, began, "GET", "/ready")["hit"]
        until_ready = time.monotonic() - began
        answer(process, port, began, "POST", "/embed", json.dumps({"sentences": SENTENCES}))
        return {"ready": until_ready, "answer": time.monotonic() - began, "hit": hit}
    finally:
        process.terminate()
        process.wait(timeout=WAIT)


def answer(process: Any, port: int, began: float, method: str, path: str, body: str | None = None) -> Any:
    """The first good answer to a request."""
    while process.poll() is None and time.monotonic() - began < WAIT:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, body)
            found = connection.getresponse()
            if found.status == 200:
                return json.loads(found.read())
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.005)
    raise FailedError(f"{path}: no answer")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    results = Results(Path(options.json), "serve", again=options.again)
    done = measure.estimate(options.rounds * 12, "services, beside compiling once")
    directory = Path(options.dir) / "prepared" / "serve"
    prewarm(directory)
    for number in range(options.rounds):
        for service in SERVICES:
            if len(results.samples.setdefault(service, [])) <= number:
                results.samples[service].append(start(directory, service))
                results.save()
        say(f"round {number + 1} of {options.rounds}")
    done()
    eager, ours = results.samples["eager"], results.samples["stitchcache"]
    goals = []
    for what, name in (("ready", "ready"), ("answer", "the first answer")):
        later = statistics.median(b[what] - a[what] for a, b in zip(eager, ours, strict=True))
        goals.append(Goal(f"{name} later than eager's service", later, "<=", 0.4, "s"))
    goals.append(Goal("starts without a direct hit", sum(s["hit"] != "direct" for s in ours), "<=", 0))
    results.record["goals"] = records(goals)
    results.save()
    rows = [
        (service, *(f"{statistics.median(s[what] for s in found):.2f}" for what in ("ready", "answer")))
        for service, found in results.samples.items()
    ]
    print(table(("service", "ready, s", "first answer, s"), rows))
    return settle(goals)


if __name__ == "__main__":
    sys.exit(main())
