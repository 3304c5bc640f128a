"""Simulates a fleet that starts over one remote: ``python simulate_fleet.py`` (needs simpy; runs no model).

Nodes start within a minute. Each asks for a target, an entry and its blobs, as ``stitchcache.remote`` does:
blobs side by side, each request tried three times, one second of patience that received bytes give back. In
a cold fleet the pieces are compiled once, under leases, and the others poll. What the store answers is
bounded by its published limits.

Published: S3 answers 5,500 GET and 3,500 PUT a second and prefix, and 503 beyond that. Assumed, and
measured nowhere: 30 ms in the median to the first byte (S3's guide says 100 to 200 ms for small objects),
prices of $0.0004 for 1,000 GETs and $0.005 for 1,000 PUTs, 3,000 layers a second from a registry, 0.09 s from
the bytes to the first output, 25 s for a piece.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass, replace

import simpy

GET_PRICE, PUT_PRICE = 0.0004 / 1000, 0.005 / 1000


@dataclass(frozen=True)
class Fleet:
    nodes: int = 10_000
    within: float = 60.0  # seconds in which nodes start
    blobs: int = 16
    bytes_each: int = 300_000
    gets: float = 5500.0  # a second
    puts: float = 3500.0
    latency: float = 0.03  # median to the first byte
    bandwidth: float = 300e6  # bytes a second and node
    patience: float = 1.0
    start: float = 0.09  # from the last byte to the first output
    compile: float = 25.0  # a piece
    at_once: int = 4  # pieces that a node compiles at a time
    cold: bool = False
    jitter: bool = True  # of retries and polls
    layer: int = 1  # nodes that share one directory; only the first asks


class Store:
    """A token bucket for each kind of request, and an answer that takes a while."""

    def __init__(self, env: simpy.Environment, fleet: Fleet) -> None:
        self.env, self.fleet, self.asked = env, fleet, Counter()
        self.tokens = {"GET": [fleet.gets, 0.0, fleet.gets], "PUT": [fleet.puts, 0.0, fleet.puts]}

    def ask(self, kind: str, size: int = 0):
        """One try: whether it was answered."""
        self.asked[kind] += 1
        rate, seen, left = self.tokens[kind]
        left = min(rate, left + (self.env.now - seen) * rate)
        good = left >= 1
        self.tokens[kind] = [rate, self.env.now, left - good]
        spread = random.lognormvariate(0, 0.5) if good else 1.0
        yield self.env.timeout(self.fleet.latency * spread + (size / self.fleet.bandwidth if good else 0))
        if not good:
            self.asked["503"] += 1
        return good

    def tried(self, kind: str, size: int = 0):
        """One request with its retries."""
        for attempt in range(3):
            if (yield from self.ask(kind, size)):
                return True
            pause = 0.1 * 2**attempt
            yield self.env.timeout(pause * random.random() if self.fleet.jitter else pause)
        return False


class Node:
    def __init__(self, env, fleet: Fleet, store: Store, pieces: dict, seconds: list, lost: Counter) -> None:
        self.env, self.fleet, self.store = env, fleet, store
        self.pieces, self.seconds, self.lost = pieces, seconds, lost

    def fetch(self):
        """Target, entry, blobs; whether all came within the patience."""
        fleet, began = self.fleet, self.env.now
        for size in (20_000, 60_000):
            if not (yield from self.store.tried("GET", size)):
                return False
        jobs = [
            self.env.process(self.store.tried("GET", fleet.bytes_each * min(16, fleet.blobs)))
            for _ in range(fleet.blobs)
        ]
        yield self.env.all_of(jobs)
        credit = fleet.blobs * fleet.bytes_each / 262_144
        late = self.env.now - began > fleet.patience + credit
        return all(job.value for job in jobs) and not late

    def run(self, delay: float):
        yield self.env.timeout(delay)
        began, fleet = self.env.now, self.fleet
        if fleet.cold and len(self.pieces["done"]) < fleet.blobs:
            yield from self.share()
        elif not (yield from self.fetch()):
            # It compiles by itself; the remote has cost it the patience.
            self.lost["compiled alone"] += 1
            yield self.env.timeout(fleet.compile * fleet.blobs / fleet.at_once)
        yield self.env.timeout(fleet.start)
        self.seconds.append(self.env.now - began)

    def share(self):
        """Take what leases are free, compile, and wait for the rest."""
        fleet, state = self.fleet, self.pieces
        mine = []
        for piece in range(fleet.blobs):
            yield from self.store.tried("PUT")
            if piece not in state["held"]:
                state["held"].add(piece)
                mine.append(piece)
        for start in range(0, len(mine), fleet.at_once):
            yield self.env.timeout(fleet.compile)
            for piece in mine[start : start + fleet.at_once]:
                yield from self.store.tried("PUT", fleet.bytes_each)
                self.lost["compiled"] += 1
                state["done"].add(piece)
        pause = 0.1
        for piece in range(fleet.blobs):
            while piece not in state["done"]:
                yield from self.store.tried("GET")
                yield self.env.timeout(pause * random.uniform(0.5, 1.5) if fleet.jitter else pause)
                pause = min(pause * 1.5, 2.0)
            yield from self.store.tried("GET", fleet.bytes_each)


def simulate(fleet: Fleet) -> dict[str, float]:
    random.seed(18)
    env = simpy.Environment()
    store, seconds, lost = Store(env, fleet), [], Counter()
    pieces = {"held": set(), "done": set()}
    asking = fleet.nodes // fleet.layer
    for _ in range(asking):
        node = Node(env, fleet, store, pieces, seconds, lost)
        env.process(node.run(random.uniform(0, fleet.within)))
    env.run()
    seconds.sort()
    dollars = store.asked["GET"] * GET_PRICE + store.asked["PUT"] * PUT_PRICE
    return {
        "p50": seconds[len(seconds) // 2],
        "p99": seconds[int(len(seconds) * 0.99)],
        "requests": store.asked["GET"] + store.asked["PUT"],
        "503": store.asked["503"],
        "alone": lost["compiled alone"],
        "dollars": dollars,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--blobs", type=int, default=16)
    given = parser.parse_args()
    warm = Fleet(nodes=given.nodes, blobs=given.blobs)
    cold = replace(warm, cold=True)
    rows = {
        "warm, within a minute": warm,
        "warm, within a minute, no jitter": replace(warm, jitter=False),
        "warm, within 10 s": replace(warm, within=10.0),
        "warm, within 10 s, no jitter": replace(warm, within=10.0, jitter=False),
        "warm, within 10 s, 10 s of patience": replace(warm, within=10.0, patience=10.0),
        "warm, within 10 s, 8 nodes a layer": replace(warm, within=10.0, layer=8),
        "warm, a registry": replace(
            warm, gets=3000.0, blobs=1, bytes_each=given.blobs * 300_000, latency=0.1
        ),
        "cold, within a minute": cold,
        "cold, within a minute, no jitter": replace(cold, jitter=False),
        "cold, within a minute, 8 nodes a layer": replace(cold, layer=8),
    }
    print(f"| {given.nodes:,} nodes, {given.blobs} blobs | p50 s | p99 s | requests | 503 | alone | $ |")
    print("|---|---|---|---|---|---|---|")
    for name, fleet in rows.items():
        found = simulate(fleet)
        print(
            f"| {name} | {found['p50']:.2f} | {found['p99']:.2f} | {found['requests']:,} | {found['503']:,} "
            f"| {found['alone']:,} | {found['dollars']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
