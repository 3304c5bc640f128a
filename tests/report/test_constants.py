"""A consts table is shown in words: nothing that it names is imported, made or called."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

from stitchcache.report.constants import shown_consts


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_values_are_shown_and_calls_are_only_told():
    shown = shown_consts(pickle.dumps([1.5, "text", {"a": (1, 2)}, Runs(), "\x1b[2J" * 99, [[[[[[1]]]]]]], 4))
    assert shown[:3] == ["1.5", "'text'", "{'a': (1, 2)}"]
    assert shown[3] == "posix.system('touch /tmp/never',)" or shown[3].startswith("posix.system(")
    assert "\x1b" not in shown[4]
    assert all(len(line) <= 200 for line in shown)
    assert shown_consts(None) == []
    assert shown_consts(b"junk")[0].startswith("(cannot be read:")
    assert shown_consts(pickle.dumps(7, 4)) == ["7"]


def test_nothing_is_imported_for_it():
    script = """
import sys, pickle
from stitchcache.artifact.consts import dump_consts
from stitchcache.report.constants import shown_consts
import fractions, torch, collections
table = dump_consts([torch.float32, torch.ones(2, 3), float("inf"), torch.ops.aten.add.Tensor, slice(1, 2),
                     collections.OrderedDict(a=1), {3, 4}, torch.device("cpu")])
print(table.hex())
"""
    path = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    look = f"""
import sys
from stitchcache.report.constants import shown_consts
before = set(sys.modules)
for line in shown_consts(bytes.fromhex("{done.stdout.strip()}")):
    print(line)
assert set(sys.modules) == before, set(sys.modules) - before
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "torch 'float32'"
    assert lines[1] == "tensor float32[2, 3] cpu"
    assert lines[2] == "inf"
    assert lines[3].startswith("op 'aten::add'")
    assert "slice" in lines[4]
    assert lines[5] == repr(OrderedDict(a=1))
