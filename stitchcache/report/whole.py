"""A whole cache: what takes space, what entries share, what was hit and saved, and what nobody used."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from stitchcache.cache import Cache

_STORED_WITHIN = 120.0
"""Seconds after an entry was made in which storing it, and not a use, may have set its file's time."""
_NOTED_EVERY = 3600.0
"""Seconds that the store lets pass before it notes another use of an entry."""
_SUMMED = ("own_bytes", "hits", "compiled", "saved_seconds")


def cache_report(cache: Cache) -> dict[str, Any]:
    """Everything that is known of a cache; only headers of entries are read."""
    headers, counted, now = cache.entries(), cache.starts(), time.time()
    blobs = [blob for header in headers for blob in header.blobs]
    users, sizes = Counter(blob.digest for blob in blobs), {blob.digest: blob.size for blob in blobs}
    entries = []
    for header in headers:
        alone = sum([blob.size for blob in header.blobs if users[blob.digest] == 1])
        stored = header.created + header.compile_seconds + _STORED_WITHIN
        facts = counted.pop(header.graph_hash[:12], {})
        hits = sum([number for name, number in facts.items() if name.startswith("hit.")])
        known = 0 < header.created < now - _NOTED_EVERY or header.last_used > stored
        entries.append(
            {
                "graph_hash": header.graph_hash,
                "label": header.label,
                "created": header.created,
                "last_used": header.last_used,
                # Of entries without a date, and of new ones, it is not known.
                "used": hits > 0 or header.last_used > stored if known or hits else None,
                "hits": hits,
                "compiled": facts.get("compiled", 0),
                "saved_seconds": facts.get("saved", 0) / 1e6,
                "compile_seconds": header.compile_seconds,
                "bytes": header.file_bytes + header.blob_bytes,
                "own_bytes": header.file_bytes + alone,
            }
        )
    shared = {digest: number for digest, number in users.items() if number > 1}
    stats = cache.stats(headers)
    return {
        "root": cache.paths[0],
        "stats": asdict(stats),
        "entries": sorted(entries, key=lambda entry: (-entry["own_bytes"], entry["graph_hash"])),
        "labels": _by_label(entries),
        "shared": {
            "blobs": len(shared),
            "bytes": sum(sizes[digest] for digest in shared),
            "saved_bytes": sum(sizes[digest] * (number - 1) for digest, number in shared.items()),
        },
        **_starts(stats.counters),
    }


def _by_label(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    labels, rows = defaultdict[str, list[dict[str, Any]]](list), []
    for entry in entries:
        labels[entry["label"]].append(entry)
    for label, group in labels.items():
        unused, last_used = sum(e["used"] is False for e in group), max(e["last_used"] for e in group)
        row = {"label": label, "entries": len(group), "unused": unused, "last_used": last_used}
        row |= {name: sum(entry[name] for entry in group) for name in _SUMMED}
        starts = row["hits"] + row["compiled"]
        rows.append({**row, "hit_rate": row["hits"] / starts if starts else None})
    return sorted(rows, key=lambda row: (-row["own_bytes"], row["label"]))


def _starts(counters: Any) -> dict[str, Any]:
    """Starts by what they found, with the share of hits; ``None`` where none was counted."""
    direct, graph, compiled = (counters.get(name, 0) for name in ("hit.direct", "hit.graph", "compiled"))
    starts = direct + graph + compiled
    return {
        "starts": starts,
        "direct_hits": direct,
        "graph_hits": graph,
        "compiled": compiled,
        "hit_rate": (direct + graph) / starts if starts else None,
        "misses": {name.removeprefix("miss."): n for name, n in counters.items() if name.startswith("miss.")},
        "spent_seconds": counters.get("microseconds.spent", 0) / 1e6,
        "saved_seconds": counters.get("microseconds.saved", 0) / 1e6,
    }
