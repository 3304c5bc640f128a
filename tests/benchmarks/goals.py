"""What the project wants of itself, and whether a result meets it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ways
from measure import median_of, ratio_of

Samples = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One goal with what was reached; judged at the digits that are printed.

    Args:
        name: What is meant.
        value: What was measured.
        relation: ``<=``, ``>=`` or ``<``.
        limit: What is wanted.
        unit: Behind both numbers.
    """

    name: str
    value: float
    relation: str
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        value = round(self.value, 2)
        return {"<=": value <= self.limit, ">=": value >= self.limit, "<": value < self.limit}[self.relation]

    def __str__(self) -> str:
        state = "met   " if self.met else "MISSED"
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"  {state}  {self.name}: {_number(self.value)}{unit} (goal {self.relation} {self.limit:g}{unit})"
        )


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def settle(goals: Sequence[Goal]) -> int:
    """Print goals; the exit status: 1 if one is missed."""
    print("goals")
    for goal in goals:
        print(goal)
    return 0 if all(goal.met for goal in goals) else 1


def records(goals: Iterable[Goal]) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [asdict(goal) | {"met": goal.met} for goal in goals]


def warm_goals(samples: Samples) -> list[Goal]:
    """Goals of the warm start, for the models that were measured."""
    found: list[Goal] = []
    limits = {"decoder-4": 25, "decoder-16": 25, "minilm": 100}
    for subject, by_way in samples.items():
        if subject == "lookup":
            total = statistics.median(s["key"] + s["sources"] for s in by_way["samples"])
            found.append(Goal(f"{by_way['subject']}: direct lookup", total * 1e3, "<=", 20, "ms"))
            continue
        if ways.UNCHECKED in by_way and ways.OURS in by_way:
            checked, bare = (
                statistics.median(s["after_build"] for s in by_way[way])
                for way in (ways.OURS, ways.UNCHECKED)
            )
            most = 20 if subject == "minilm" else 5
            found.append(Goal(f"{subject}: what the look adds", (checked - bare) * 1e3, "<=", most, "ms"))
        for mine in (ways.OURS, ways.UNCHECKED, ways.BACKGROUND, ways.IMPORTED, ways.PRELOADED):
            if mine in by_way:
                found += _warm_goals(subject, by_way, mine, limits.get(subject))
    return found


def _warm_goals(subject: str, by_way: Samples, mine: str, limit: float | None) -> list[Goal]:
    """Goals of one of our two ways to start."""
    ours, name = by_way[mine], f"{subject}: {ways.LABELS[mine]}"
    after = [s["after_build"] for s in ours]
    found = []
    if limit is not None:
        found.append(Goal(f"{name}, after build", statistics.median(after) * 1e3, "<=", limit, "ms"))
    for way, least in ((ways.VLLM, 100), (ways.COMPILE, 100), (ways.PACKAGE, 50)):
        if way in by_way:
            ratio = ratio_of([s["after_build"] for s in by_way[way]], after)
            found.append(
                Goal(f"{subject}: {ways.LABELS[way]} / {ways.LABELS[mine]}", ratio, ">=", least, "x")
            )
    for key, what in (("process", "time to the first output"), ("peak_mb", "peak memory")):
        if ways.EAGER in by_way:
            ratio = ratio_of([s[key] for s in ours], [s[key] for s in by_way[ways.EAGER]])
            found.append(Goal(f"{name}, {what} / eager's", ratio, "<=", 1.05, "x"))
    other = sum(s.get("hit") != "direct" or bool(s["compilers"]) for s in ours)
    found.append(Goal(f"{name}, starts without a direct hit, or with a compiler", other, "<=", 0))
    return found


def cold_goals(samples: Samples) -> list[Goal]:
    """Goals of the cold compile by the number of layers."""
    seconds = {
        (way, layers_of(subject)): median_of(found, "after_build")
        for subject, by_way in samples.items()
        for way, found in by_way.items()
    }
    wanted = (
        ("32 layers / 4 layers", (ways.OURS, 32), (ways.OURS, 4), "<=", 1.15),
        ("4 layers: stitchcache / torch.compile", (ways.OURS, 4), (ways.COMPILE, 4), "<=", 1.2),
        ("32 layers: stitchcache / torch.compile", (ways.OURS, 32), (ways.COMPILE, 32), "<", 0.5),
    )
    return [
        Goal(name, seconds[a] / seconds[b], relation, limit, "x")
        for name, a, b, relation, limit in wanted
        if a in seconds and b in seconds
    ]


def layers_of(subject: str) -> int:
    """The number of layers in a subject's name."""
    found = re.search(r"-(\d+)", subject)
    return int(found[1]) if found else 0


def call_goals(samples: Samples) -> list[Goal]:
    """Goals of one call."""
    found: list[Goal] = []
    for subject, record in samples.items():
        times = record["us"]
        if subject == "decoder-4":
            limits = {ways.VLLM: 0.85, ways.COMPILE: 0.95, ways.PACKAGE: 1.0, ways.RUNNER: 1.03}
            for way, limit in limits.items():
                case = times.get("small, 1 thread", {})
                if way in case and ways.OURS in case:
                    ratio = ratio_of(case[ways.OURS], case[way])
                    name = f"{subject}, small, 1 thread: stitchcache / {ways.LABELS[way]}"
                    found.append(Goal(name, ratio, "<=", limit, "x"))
        if subject == "minilm":
            for case, by_way in times.items():
                for mine in (ways.OURS, ways.WHOLE):
                    found += _fastest(f"{subject}, {case}", by_way, mine)
        if "overhead" in record:
            own = {key: statistics.median(values) for key, values in record["overhead"].items()}
            found.append(Goal(f"{subject}: own overhead a piece", own["piece_us"], "<=", 0.3, "us"))
            found.append(Goal(f"{subject}: own overhead a call", own["call_us"], "<=", 3, "us"))
    return found


def _fastest(case: str, by_way: Samples, mine: str) -> list[Goal]:
    """That one of our ways is as quick as the quickest of the others."""
    if mine not in by_way:
        return []
    others = {
        way: ratio_of(by_way[mine], times)
        for way, times in by_way.items()
        if way not in (ways.OURS, ways.WHOLE, ways.RUNNER)
    }
    if not others:
        return []
    way = max(others, key=others.__getitem__)
    name = f"{case}: {ways.LABELS[mine]} / the fastest other ({ways.LABELS[way]})"
    return [Goal(name, others[way], "<=", 1.0, "x")]
