"""What processes counted: ``stats/counters``, which has a line ``name=number`` for each count.

A line ``start.<12 digits of a graph hash>=name:number,...`` is about the starts of one entry: how many of
each kind (``hit.direct``), what they ``saved``, the stages of the last one (``last.<stage>``), in
microseconds, and when it was (``last.at``), in Unix seconds.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from stitchcache.errors import EntryFormatError
from stitchcache.store import Area, patiently
from stitchcache.store.root import Root

if TYPE_CHECKING:
    from stitchcache.store.store import Start

SINCE = "since"
_PLACE = f"{Area.STATS}/counters"
_MOST_STARTS = 512  # entries, those started last: each process that counts writes all of them
_PREFIX, _DIGITS = "start.", 12


def stored_lines(root: Root) -> list[str]:
    """The lines of a root's counts; none where they are damaged."""
    try:
        found = root.read(f"{root.path}/{_PLACE}", Area.STATS)
    except EntryFormatError:
        found = None
    return found[0].decode("ascii", "replace").splitlines() if found else []


def starts_in(lines: Iterable[str], started: Iterable[Start]) -> dict[str, dict[str, int]]:
    """What lines say of single entries, and starts since, the last one at the end."""
    found = {}
    for line in lines:
        name, _, facts = line.partition("=")
        if name.startswith(_PREFIX) and len(name) == len(_PREFIX) + _DIGITS:
            found[name.removeprefix(_PREFIX)] = numbers_in(facts.split(","), ":")
    for graph_hash, how, saved, at, stages in started:
        before = found.pop(graph_hash[:_DIGITS], {})
        now = {name: number for name, number in before.items() if not name.startswith("last.")}
        for name, number in ((how, 1), ("saved", int(saved * 1e6))):
            now[name] = now.get(name, 0) + number
        now["last.at"] = int(at)
        now |= {f"last.{stage}": int(seconds * 1e6) for stage, seconds in stages.items()}
        found[graph_hash[:_DIGITS]] = now
    return found


def numbers_in(pairs: Iterable[str], joint: str) -> dict[str, int]:
    """Numbers by name; other text is left out."""
    split = (pair.partition(joint) for pair in pairs)
    # And no number that takes long to read.
    return {n: int(v) for n, _, v in split if " " not in n and v.isdigit() and len(v) < 20}


def write_counts(root: Root, pending: Counter[str], started: Iterable[Start]) -> None:
    """Add to what is stored."""
    files, path = root.files, f"{root.path}/{_PLACE}"
    root.make_dir(os.path.dirname(path))
    with files.opened(root.in_dir(f"{path}.lock", files.open_or_create)) as fd:
        # Without the lock another process's counts may be lost, and that is all.
        patiently(partial(files.try_lock, fd, plain=True))
        lines = stored_lines(root)
        counts = Counter(numbers_in(lines, "=")) + pending
        counts[SINCE] = counts[SINCE] or int(time.time())
        text = "".join(f"{name}={number}\n" for name, number in sorted(counts.items()))
        for graph, facts in list(starts_in(lines, started).items())[-_MOST_STARTS:]:
            text += f"{_PREFIX}{graph}={','.join(f'{name}:{number}' for name, number in facts.items())}\n"
        root.publish(path, text.encode(), last=False)
