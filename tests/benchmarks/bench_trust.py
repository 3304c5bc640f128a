"""What trust costs a warm start: one signed cache, started from with trust any, owner and signed in turn.

    python tests/benchmarks/bench_trust.py [--subjects decoder-4,minilm] [--rounds 15] [--dir DIR] ...

Each start is a fresh process. Beside that one process looks the same entry up again and again: its target
record, its entry, its pieces opened and digested. That difference is less noisy than the one between whole
starts. Prints goals; exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import ways
from goals import Goal, records, settle
from measure import Results, say
from report import table

SUBJECTS = "decoder-4,minilm"
POLICIES = ("any", "owner", "signed")


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=measure.split_list, default=SUBJECTS.split(","))
    parser.add_argument("--rounds", type=int, help="fresh processes with each policy; by default 15")
    measure.common_options(parser)
    options = parser.parse_args(argv)
    options.subjects = options.subjects[:1] if options.quick else options.subjects
    options.rounds = options.rounds or (1 if options.quick else 15)
    options.json = options.json or Path(options.dir) / "trust.json"
    return options


def run(options: argparse.Namespace, subject: str, trust: str, **more: Any) -> dict[str, Any]:
    """One fresh process with a policy."""
    directory = Path(options.dir) / "prepared" / subject / "trust"
    job = {"mode": "start", "way": ways.OURS, "subject": subject, "directory": str(directory), "trust": trust}
    return measure.run_child({**job, "cold": False, **more}, options.dir, Path(__file__).resolve())


def measure_subject(options: argparse.Namespace, subject: str) -> dict[str, Any]:
    """Starts with each policy in turn, then lookups with each in turn."""
    # Signed as it is stored; nothing is compiled where an earlier run left it.
    run(options, subject, "owner", cold=True)
    for trust in POLICIES:
        # A user's first start from signed files verifies them once and for all.
        run(options, subject, trust)
    starts: dict[str, list[Any]] = {trust: [] for trust in POLICIES}
    for number in range(options.rounds):
        for trust in POLICIES:
            starts[trust].append(run(options, subject, trust))
        say(f"{subject}: round {number + 1} of {options.rounds}")
    lookups = run(options, subject, "owner", mode="lookups", rounds=5 if options.quick else 200)
    return {"starts": starts, "lookups": lookups}


def in_child(job: dict[str, Any]) -> dict[str, Any]:
    """What one fresh process does."""
    directory = Path(job["directory"])
    os.environ["STITCHCACHE_KEYS"] = str(directory / "keys")
    os.environ["STITCHCACHE_TRUST"] = job["trust"]
    if job["mode"] == "lookups":
        return lookups(directory / "cache", job["rounds"])
    if job["cold"]:
        from stitchcache.ext.sign import Keys

        if not Keys().can_sign():
            Keys().generate("bench@example.com")
    import child

    return child.start(job)


def lookups(root: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a lookup with each policy, and of the digests alone."""
    import stitchcache

    found: dict[str, list[float]] = {trust: [] for trust in (*POLICIES, "digests")}
    target = max((root / "targets").glob("*/*"), key=os.path.getmtime)
    for _ in range(rounds):
        for trust in POLICIES:
            began = time.perf_counter()
            cache = stitchcache.Cache(root, trust=trust)
            artifact: Any = cache.get(cache.get_target(target.name)[0].graph_hash)
            with cache.opened(list({piece.blob: None for piece in artifact.pieces})) as paths:
                found[trust].append(time.perf_counter() - began)
        used = [target, root / "entries" / artifact.graph_hash[:2] / f"{artifact.graph_hash}.stitch"]
        used += [cache.blob_path(blob) for blob in artifact.blobs]
        contents = [path.read_bytes() for path in used]
        began = time.perf_counter()
        for content in contents:
            hashlib.sha256(content).digest()
        found["digests"].append(time.perf_counter() - began)
    return {"seconds": found, "bytes": sum(map(len, contents)), "pieces": len(paths)}


def goals_of(samples: dict[str, Any]) -> list[Goal]:
    """What each policy adds."""
    goals = []
    for subject, record in samples.items():
        after = {trust: [s["after_build"] for s in found] for trust, found in record["starts"].items()}
        seconds = record["lookups"]["seconds"]
        signed, owner = added(seconds, "signed", "owner"), added(seconds, "owner", "any")
        checks = owner + statistics.median(seconds["digests"])
        start = statistics.median(after["owner"])
        goals += [
            Goal(f"{subject}: what a signature adds to a lookup", signed * 1e3, "<=", 2, "ms"),
            Goal(
                f"{subject}: the same of whole starts", added(after, "signed", "owner") * 1e3, "<=", 2, "ms"
            ),
            Goal(f"{subject}: digests and owners, of a start", checks / start * 100, "<=", 5, "%"),
        ]
        other = sum(s.get("hit") != "direct" for found in record["starts"].values() for s in found)
        goals.append(Goal(f"{subject}: starts without a direct hit", other, "<=", 0))
    return goals


def added(times: dict[str, list[float]], more: str, less: str) -> float:
    """Median of differences in seconds, taken round by round."""
    return statistics.median(a - b for a, b in zip(times[more], times[less], strict=True))


def table_of(samples: dict[str, Any]) -> str:
    """One row a model and policy."""
    rows = []
    for subject, record in samples.items():
        for trust in POLICIES:
            after = statistics.median(s["after_build"] for s in record["starts"][trust])
            lookup = statistics.median(record["lookups"]["seconds"][trust])
            rows.append((subject, trust, f"{after * 1e3:.1f}", f"{lookup * 1e3:.2f}"))
        digests = statistics.median(record["lookups"]["seconds"]["digests"])
        size = f"sha256 of {record['lookups']['bytes'] / 1e6:.1f} MB alone"
        rows.append((subject, size, "", f"{digests * 1e3:.2f}"))
    return table(("model", "trust", "after build, ms", "lookup, ms"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = options_of(argv)
    results = Results(Path(options.json), "trust", again=options.again)
    left = [subject for subject in options.subjects if subject not in results.samples]
    done = measure.estimate(len(left) * (options.rounds + 1) * 3 * 1.5, "trust, beside compiling once")
    for subject in left:
        results.samples[subject] = measure_subject(options, subject)
        results.save()
    done()
    goals = goals_of(results.samples)
    results.record["goals"] = records(goals)
    results.save()
    print(table_of(results.samples))
    return settle(goals)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(in_child(json.loads(sys.argv[1]))), flush=True)
        sys.exit()
    sys.exit(main())
