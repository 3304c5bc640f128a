"""What the store costs. Run ``python tests/benchmarks/bench_store.py``; figures are medians in ms."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from stores import artifact, key, put, target

from stitchcache.cache import Cache


def median(work: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        gc.collect()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


def bench_get(place: Path) -> list[tuple[str, float, float | None]]:
    made = put(Cache(place), "a", [os.urandom(1_500_000) for _ in range(3)])
    Cache(place).put_target(key("t"), target(made.graph_hash))

    def load() -> None:
        cache = Cache(place)
        (record,) = cache.get_target(key("t"))
        found = cache.get(record.graph_hash)
        assert all(cache.blob_path(piece.blob) for piece in found.pieces)

    def entry_only() -> None:
        assert Cache(place).get(made.graph_hash)

    return [
        ("target, entry and three 1.5 MB blobs, digests checked", median(load, 30), 10),
        ("entry alone", median(entry_only, 30), None),
    ]


def bench_put(place: Path) -> list[tuple[str, float, float | None]]:
    rows = []
    for durability in ("full", "fast"):
        turn = iter(range(1000))

        cache = Cache(place / durability, durability=durability)

        def one(cache=cache, turn=turn) -> None:
            put(cache, next(turn), [os.urandom(1_500_000) for _ in range(3)])

        rows.append((f"put with three new 1.5 MB blobs, durability {durability}", median(one, 15), None))
    generate = median(lambda: [os.urandom(1_500_000) for _ in range(3)], 15)
    return [(name, cost - generate, limit) for name, cost, limit in rows]


def bench_many(place: Path, count: int) -> list[tuple[str, float, float | None]]:
    cache = Cache(place, durability="fast")
    shared = cache.put_blob(b"shared by all")
    for index in range(count):
        cache.put(artifact(index, [shared, cache.put_blob(str(index).encode())]))
    fresh = Cache(place)
    return [
        (f"headers of {count} entries", median(fresh.entries, 3), 1000),
        (f"prune plan over {count} entries", median(lambda: fresh.plan_prune(max_bytes=1 << 20), 3), 2000),
        (f"statistics over {count} entries", median(fresh.stats, 3), None),
    ]


def bench_commands(place: Path) -> list[tuple[str, float, float | None]]:
    place.mkdir()

    def run(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run(
            [sys.executable, *words], check=True, stderr=subprocess.DEVNULL, env={**os.environ, **settings}
        )

    settings = {"STITCHCACHE_DIR": str(place)}
    bare = median(run("-c", "pass"), 9)
    imported = median(run("-c", "import stitchcache.cache"), 9)
    before = os.times()
    listed = median(run("-m", "stitchcache", "ls"), 15)
    after = os.times()
    used = (after.children_user + after.children_system - before.children_user - before.children_system) / 15
    source = (
        "import sys; sys.argv[1:] = ['ls']; import atexit; "
        "atexit.register(lambda: print(*sorted({'torch', 'numpy', 'rich', 'filelock'} & set(sys.modules)))); "
        "from stitchcache.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = done.stdout.strip() or "no torch"
    if heavy != "no torch":
        listed = float("inf")
    return [
        ("import of stitchcache.cache, over a bare interpreter", imported - bare, None),
        (f"python -m stitchcache ls, empty cache (imports {heavy})", listed, 150),
        ("the same, processor time", used * 1000, None),
        ("of which a bare interpreter", bare, None),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--dir", help="where to make the stores")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        place = Path(name)
        rows = bench_get(place / "get") + bench_put(place / "put")
        rows += bench_many(place / "many", options.entries) + bench_commands(place / "empty")
    load = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} processors, load {load:.1f}" + (" (busy: times are too long)" if load > 1 else "")
    )
    missed = 0
    for what, cost, limit in rows:
        verdict = "" if limit is None else f"limit {limit:g}" + ("" if cost <= limit else "  MISSED")
        missed += limit is not None and cost > limit
        print(f"{cost:10.2f} ms  {what:58s} {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
