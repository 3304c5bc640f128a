"""Modules whose names are those of kinds of entries in a record: ``env``, ``call``, ``item``."""

from __future__ import annotations

NAMES = ["env", "call", "item", "global_"]
PROGRAM = """
import importlib, json, sys, torch, stitchcache
found = {{}}
for name in {names!r}:
    model = importlib.import_module("project_" + name).Net().eval()
    cache = stitchcache.Cache({root!r})
    compiled = stitchcache.compile(model, (torch.ones(3),), backend="eager", cache=cache)
    found[name] = [compiled.cache_hit, compiled(torch.ones(3)).tolist()]
print(json.dumps(found))
"""


def test_they_hit_directly_until_they_change(tmp_path, fresh_process):
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("FACTOR = 2\n")
        (tmp_path / f"project_{name}.py").write_text(
            f"import torch\nimport {name}\n\n\nclass Net(torch.nn.Module):\n"
            f"    def forward(self, x):\n        return x * {name}.FACTOR\n"
        )
    source = PROGRAM.format(names=NAMES, root=str(tmp_path / "cache"))
    first = fresh_process(source)
    assert {name: y for name, (_, y) in first.items()} == dict.fromkeys(NAMES, [2.0] * 3)
    assert "direct" not in [hit for hit, _ in first.values()]
    assert fresh_process(source) == {name: ["direct", [2.0] * 3] for name in NAMES}
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("FACTOR = 3\n")
    changed = fresh_process(source)
    assert {name: y for name, (_, y) in changed.items()} == dict.fromkeys(NAMES, [3.0] * 3)
    assert "direct" not in [hit for hit, _ in changed.values()]


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
