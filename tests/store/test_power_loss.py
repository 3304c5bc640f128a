"""Power fails at random moments of a recorded run: nothing acknowledged is lost, nothing wrong is served."""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from powerloss import Recording, build, states
from stores import key, put, read_back, target

from stitchcache.cache import Cache


def content(name: int, turn: int) -> list[bytes]:
    return [b"shared by all" * 50, f"{name} {turn} ".encode() * 100]


def record(root: Path, durability: str) -> Recording:
    files = Recording(root)
    cache = Cache(root, _files=files, durability=durability)
    for turn in range(6):
        for name in range(3):
            put(cache, name, content(name, turn))
            files.mark(f"put {name} {turn}")
            cache.put_target(key(f"t{name}"), target(key(name)))
            files.mark(f"target {name}")
        if turn == 3:
            files.mark("prune")
            cache.plan_prune(max_files=8, grace_seconds=0).execute()
    return files


@pytest.mark.parametrize("durability", ["full", "fast"])
def test_power_loss(durability, tmp_path, full):
    logging.getLogger("stitchcache").setLevel(logging.CRITICAL)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    files = record(tmp_path / "root", durability)
    rng = random.Random(7)
    place = Path(tempfile.mkdtemp(dir=memory))
    served = lost = 0
    try:
        for marks, state in states(files.log, 10_000 if full else 400, rng):
            build(state, str(tmp_path / "root"), place / "root")
            cache = Cache(place / "root", durability="fast")
            since_prune = marks[len(marks) - marks[::-1].index("prune") :] if "prune" in marks else marks
            for name in range(3):
                acknowledged = [int(mark.split()[2]) for mark in marks if mark.startswith(f"put {name} ")]
                found = read_back(cache, key(name))
                if found is not None:
                    served += 1
                    turn = int(found[1].split()[1])
                    assert found == content(name, turn)
                    assert durability == "fast" or turn >= max(acknowledged, default=0)
                elif acknowledged:
                    lost += 1
                    evicted = not any(mark.startswith(f"put {name} ") for mark in since_prune)
                    assert durability == "fast" or evicted
                if durability == "full" and f"target {name}" in since_prune:
                    assert cache.get_target(key(f"t{name}")) == (target(key(name)),)
            report = cache.verify(repair=True)
            assert cache.verify().clean, report
            shutil.rmtree(place / "root")
    finally:
        shutil.rmtree(place)
    assert served
    if durability == "fast":
        assert lost, "the model loses nothing, so it proves nothing"
