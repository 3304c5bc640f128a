"""Processes that start cold together: one compiles, the others wait for it and load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
SCRIPT = """
import json, logging, pathlib, sys, time
import torch, stitchcache
import stitchcache.pipeline.trace
from stitchcache.pieces.eager import EagerBackend

logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
place = pathlib.Path(sys.argv[1])
compile_piece = EagerBackend.compile

def slowly(self, *args, **kwargs):
    time.sleep(float(sys.argv[3]))
    return compile_piece(self, *args, **kwargs)

EagerBackend.compile = slowly
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).eval()
x = torch.randn(4, 3)
torch.export.export(model, (x,), strict=False)
(place / f"ready.{sys.argv[2]}").touch()
while not (place / "go").exists():
    time.sleep(0.01)
compiled = stitchcache.compile(model, (x,), backend="eager", cache=stitchcache.Cache(place / "cache"))
print(json.dumps({"hit": compiled.cache_hit, "equal": torch.equal(compiled(x), model(x))}))
"""


def begin(place: Path, number: int, seconds: float) -> subprocess.Popen[str]:
    """A process that compiles when ``go`` is there, each piece in so many seconds."""
    script = place / "script.py"
    if not script.exists():
        # Once: a process begun before would read it while it is empty.
        script.write_text(SCRIPT)
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(script), str(place), str(number), str(seconds)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_many_that_start_cold_together_one_compiles(tmp_path, full):
    count = 16 if full else 4
    processes = [begin(tmp_path, number, 2) for number in range(count)]
    try:
        while len(list(tmp_path.glob("ready.*"))) < count:
            for process in processes:
                assert process.poll() is None, (process.returncode, process.communicate()[1][-2000:])
            time.sleep(0.05)
        (tmp_path / "go").touch()
        outcomes = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, outcomes
    results = [json.loads(out.splitlines()[-1]) for out, _ in outcomes]
    assert all(result["equal"] for result in results)
    hits = sorted(str(result["hit"]) for result in results)
    assert hits.count("None") == 1
    assert set(hits) <= {"None", "direct", "graph"}
    compiler = processes[[result["hit"] for result in results].index(None)].pid
    waits = [
        [line for line in err.splitlines() if f"waiting for process {compiler} on " in line]
        for _, err in outcomes
    ]
    # Each that waited said so once.
    assert sum(map(len, waits)) >= 1
    assert max(map(len, waits)) == 1
    assert [path.name for path in (tmp_path / "cache" / "locks").iterdir()] == ["blobs"]


def test_a_process_that_is_killed_while_it_compiles_frees_the_lock(tmp_path):
    """Whoever compiles has forked children, which have the lock's descriptor too."""
    (tmp_path / "go").touch()
    locks = tmp_path / "cache" / "locks"
    first = begin(tmp_path, 0, 600)
    second = None
    try:
        while not list(locks.glob("*.lock")):
            assert first.poll() is None, first.communicate()[1][-2000:]
            time.sleep(0.05)
        second = begin(tmp_path, 1, 0)
        # Long enough for the second to stand at the lock, which it need not for the test to hold.
        time.sleep(3)
        first.kill()
        out, err = second.communicate(timeout=120)
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.communicate()
    assert json.loads(out.splitlines()[-1]) == {"hit": None, "equal": True}, err[-2000:]
