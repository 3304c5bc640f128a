"""Eight threads call one model, with sizes at random, while its weights change and others come and go.

A minute of it in the usual run; an hour with STITCHCACHE_FULL=1.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import stitchcache

pytestmark = pytest.mark.compile

SECONDS = 3600.0 if os.environ.get("STITCHCACHE_FULL") == "1" else 45.0
THREADS = 8
MOST_ROWS = 64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        # Split here: two pieces with an op between them.
        y = torch.softmax(nn.functional.gelu(self.first(x)), -1)
        return self.second(y), y.sum(-1)


class Gate:
    """Many calls or one change of weights at a time."""

    def __init__(self):
        self._changed = threading.Condition()
        self._inside = 0
        self._wanted = False

    def __enter__(self):
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted)
            self._inside += 1

    def __exit__(self, *error):
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def alone(self, change):
        with self._changed:
            self._wanted = True
            self._changed.wait_for(lambda: self._inside == 0)
            change()
            self._wanted = False
            self._changed.notify_all()


def start(model, root):
    return stitchcache.compile(
        model,
        (torch.randn(4, 64),),
        dynamic_shapes=({0: stitchcache.Dim("rows", min=2, max=MOST_ROWS)},),
        splitting_ops=["aten::softmax"],
        cache=stitchcache.Cache(root),
        check="none",
    )


def memory():
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_every_result_is_eagers_and_memory_does_not_grow(compiled_root):
    torch.manual_seed(0)
    model = Net().eval()
    compiled = start(model, compiled_root)
    gate, stop = Gate(), threading.Event()
    wrong: list[str] = []
    counts = [0] * THREADS
    starts = [0]

    def call(number):
        torch.set_num_threads(1)
        chosen = random.Random(number)
        with torch.no_grad():
            while not stop.is_set():
                x = torch.randn(chosen.randint(2, MOST_ROWS), 64)
                with gate:
                    found, wanted = compiled(x), model(x)
                if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True)):
                    wrong.append(f"thread {number}, {x.shape[0]} rows")
                counts[number] += 1

    def change():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.5, 0.5)

    def come_and_go():
        other = Net().eval()
        x = torch.randn(3, 64)
        with torch.no_grad():
            while not stop.is_set():
                again = start(other, compiled_root)
                if again.cache_hit != "direct" or not torch.allclose(again(x)[0], other(x)[0], atol=1e-5):
                    wrong.append(f"start {starts[0]}: {again.cache_hit}")
                starts[0] += 1
                stop.wait(0.05)

    workers = [threading.Thread(target=call, args=(number,)) for number in range(THREADS)]
    workers.append(threading.Thread(target=come_and_go))
    for worker in workers:
        worker.start()
    end = time.monotonic() + SECONDS
    settled = None
    while time.monotonic() < end and not wrong:
        time.sleep(0.2)
        gate.alone(change)
        if settled is None and time.monotonic() > end - SECONDS * 0.7:
            settled = memory()
    stop.set()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert min(counts) > 0
    assert starts[0] > 3
    assert memory() <= settled * 1.05
