"""What commands cost that only read, on a small cache and on a large one; processor time, medians.

Run ``python tests/benchmarks/bench_commands.py``. Each entry of these caches has two blobs, one of them its
own, a piece record, a target record with 60 factors and a counted start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))

from cli_entries import artifact, key, put_target

from stitchcache.cache import Cache
from stitchcache.types import Factor

PACKAGE = Path(__file__).resolve().parents[2]
SMALL, SMALL_SECONDS, LARGE_SECONDS = 8, 0.1, 1.0
FACTORS = {f"model.part{index:02d}": f"value {index} of it" for index in range(60)}
NODE = {"env.torch": "2.13.0+cpu", "env.cpu": "some"}
COMMANDS = (
    "ls",
    "ls --json",
    "ls --sort label --wide",
    "inspect ENTRY",
    "inspect ENTRY --json",
    "inspect ENTRY --html /dev/null",
    "diff ENTRY OTHER",
    "diff ENTRY OTHER --html /dev/null",
    "explain ENTRY",
    "explain TARGET",
    "explain ENTRY --html /dev/null",
    "report",
    "report --all",
    "report --json",
    "report --html /dev/null",
    "stats",
    "stats --prometheus",
    "prune --max-size 1M",
    "prune --max-age 1d --json",
    "config",
    "doctor",
    "check --machine NODE",
    "keys list",
    "verify",
)
WITHOUT_GOAL = {
    "prune": "reads every record",
    "check": "reads the factors of every entry",
    "doctor": "tries the directory: writes too",
    "verify": "reads every byte",
}
"""Commands that cannot do with less."""


def make(place: Path, count: int) -> None:
    """A cache of so many entries; one that an earlier run made whole is taken as it is."""
    whole = place.with_suffix(".whole")
    if whole.is_file():
        return
    cache = Cache(place, durability="fast", trust="any")
    factors = tuple(Factor(name=name, value=value, digest=key(value)) for name, value in FACTORS.items())
    shared = cache.put_blob(b"shared by all" * 100)
    for index in range(count):
        own = cache.put_blob(b"blob of %d" % index * 100)
        made = artifact(cache, key(index), f"Model{index % 20}", blobs=1)
        calls = tuple(
            replace(piece, blob=blob) for piece, blob in zip(made.pieces, (own, shared), strict=True)
        )
        variants = tuple(replace(variant, pieces=calls) for variant in made.variants)
        cache.put(
            replace(made, factors=made.factors + factors, variants=variants, created=time.time() - index)
        )
        put_target(place, f"target {index}", key(index), FACTORS)
        cache.put_piece(key(f"piece {index}"), "aoti", own)
        cache.started(key(index), "hit.direct", 1.0, {"total": 0.1})
    del cache
    whole.write_text("")


def seconds(words: list[str], place: Path, rounds: int, packages: list[Path]) -> list[float]:
    """Processor time of a command in a fresh process, the median, with each of some packages in turn.

    It imports no torch and does not fail.
    """
    # As the installed script does, without what ``python -m`` imports.
    source = "from stitchcache.cli import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", source, *words]
    settings = {"STITCHCACHE_DIR": str(place), "PYTHONDONTWRITEBYTECODE": ""}
    # Not from here: the directory of the process comes before PYTHONPATH.
    how = {"cwd": place.parent, "capture_output": True, "text": True, "check": False}
    ran = {
        package: partial(subprocess.run, env={**os.environ, **settings, "PYTHONPATH": str(package)}, **how)
        for package in packages
    }
    for run in ran.values():
        done = run(command)
        # One that finds something says so by status 1.
        if done.returncode not in (0, 1) or "Traceback" in done.stderr or "| torch" in done.stderr:
            said = f"status {done.returncode}, imports torch or failed\n{done.stderr[-2000:]}"
            raise SystemExit(f"{words}: {said}")
    del command[1:3]
    found = {package: [] for package in packages}
    for _ in range(rounds):
        for package, run in ran.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run(command)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found[package].append(took)
    return [statistics.median(times) for times in found.values()]


def main() -> int:
    """Make the caches, time the commands and print a table; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=10_000, help="of the large cache")
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes for each command and cache")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "stitchcache-bench")
    parser.add_argument("--only", default="", help="commands that begin so")
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turn with this one")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    node = options.dir / "node.json"
    told = [{"name": name, "value": value, "digest": key(value)} for name, value in NODE.items()]
    node.write_text(json.dumps({"kind": "stitchcache machine", "factors": told}))
    words = {"ENTRY": key(1)[:12], "OTHER": key(2)[:12], "TARGET": key("target 1")[:12], "NODE": str(node)}
    places = {count: options.dir / f"commands-{count}" for count in (SMALL, options.entries)}
    for count, place in places.items():
        make(place, count)
    packages = [PACKAGE] if options.beside is None else [PACKAGE, options.beside.resolve()]
    beside = f" {SMALL} beside | {options.entries:,} beside |" if options.beside else ""
    print(f"| processor time, seconds | {SMALL} entries | {options.entries:,} entries |{beside} |")
    print("|---" * (beside.count("|") + 4) + "|")
    missed = 0
    for command in COMMANDS:
        if not command.startswith(options.only):
            continue
        given = [words.get(word, word) for word in command.split()]
        both = [seconds(given, place, options.rounds, packages) for place in places.values()]
        (small, large), *others = zip(*both, strict=True)
        slow = small > SMALL_SECONDS or large > LARGE_SECONDS
        note = WITHOUT_GOAL.get(command.partition(" ")[0], "**missed**" if slow else "")
        missed += note == "**missed**"
        cells = [f" {one:.3f} | {two:.2f} |" for one, two in [(small, large), *others]]
        print(f"| `{command}` |{''.join(cells)} {note} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
