"""Modules whose names are those of kinds of entries in a record: ``env``, ``call``, ``item``."""

from __future__ import annotations

import pytest

PROGRAM = """
import json, sys, torch, stitchcache
import project_{name} as project
model = project.Net().eval()
compiled = stitchcache.compile(model, (torch.ones(3),), backend="eager", cache=stitchcache.Cache({root!r}))
print(json.dumps(dict(hit=compiled.cache_hit, y=compiled(torch.ones(3)).tolist())))
"""


@pytest.mark.parametrize("name", ["env", "call", "item", "global_"])
def test_they_hit_directly_until_they_change(tmp_path, fresh_process, name):
    (tmp_path / f"{name}.py").write_text("FACTOR = 2\n")
    (tmp_path / f"project_{name}.py").write_text(
        f"import torch\nimport {name}\n\n\nclass Net(torch.nn.Module):\n"
        f"    def forward(self, x):\n        return x * {name}.FACTOR\n"
    )
    source = PROGRAM.format(name=name, root=str(tmp_path / "cache"))
    assert fresh_process(source) == {"hit": None, "y": [2.0] * 3}
    assert fresh_process(source) == {"hit": "direct", "y": [2.0] * 3}
    (tmp_path / f"{name}.py").write_text("FACTOR = 3\n")
    changed = fresh_process(source)
    assert changed["hit"] != "direct"
    assert changed["y"] == [3.0] * 3


TWO = """
import json, sys, torch, stitchcache, types
import shapes

def scaled(x):
    return x * FACTOR

first = types.FunctionType(scaled.__code__, vars(shapes), "first")

class Net(torch.nn.Module):
    def forward(self, x):
        return scaled(x) + first(x)

FACTOR = 5
model = Net().eval()
compiled = stitchcache.compile(model, (torch.ones(3),), backend="eager", cache=stitchcache.Cache({root!r}))
print(json.dumps(dict(hit=compiled.cache_hit, y=compiled(torch.ones(3)).tolist())))
"""


def test_one_code_with_two_namespaces(tmp_path, fresh_process):
    (tmp_path / "shapes.py").write_text("FACTOR = 2\n")
    source = TWO.format(root=str(tmp_path / "cache"))
    assert fresh_process(source)["y"] == [7.0] * 3
    (tmp_path / "shapes.py").write_text("FACTOR = 3\n")
    changed = fresh_process(source)
    assert changed["hit"] != "direct"
    assert changed["y"] == [8.0] * 3
