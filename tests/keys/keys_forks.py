"""Runs the project under edits, each in a forked child, and says for each whether a stored key hits.

A child that starts from scratch costs two seconds for torch alone; one forked from a process that has only
imported torch costs a quarter of one, and is as new as far as the project is concerned.
"""

import json
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

PROJECT = Path(__file__).parent / "project"


def graph_text(model, args):
    """What capture sees: the graph, and the values that it would store."""
    import torch

    with torch.no_grad():
        program = torch.export.export(model, args, strict=False)
    constants = {name: value.tolist() for name, value in program.constants.items()}
    inputs = [str(spec.kind) + str(spec.target) for spec in program.graph_signature.input_specs]
    values = [
        str(node.meta["val"].dtype) + str(tuple(node.meta["val"].shape))
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    return json.dumps([program.graph_module.code, constants, inputs, values])


def key_of(model, args, shared):
    from stitchcache.keys import target_key
    from stitchcache.torchside import tree

    leaves, spec = tree.flatten((args, {}))
    paths = tree.leaf_paths(model.forward, args, {})
    return target_key(
        model,
        list(zip(paths, leaves, strict=True)),
        tree.dumps(spec),
        None,
        (),
        None,
        "aoti",
        {},
        None,
        shared,
    )


def run_edit(folder, edit, stored):
    """In the child: import the edited project, look its key up, and capture it to see what is true."""
    from stitchcache.explanation import explain_differences
    from stitchcache.keys.check import check_sources
    from stitchcache.keys.recorder import SourceRecorder
    from stitchcache.keys.walk import Walk
    from stitchcache.types import TargetRecord

    sys.path.insert(0, str(folder))
    scope = {}
    exec("import os, torch\n" + edit.get("before", ""), scope)
    modules = edit.get("modules", "proj.model, proj.ops, proj.settings, proj.lazy")
    exec(f"import {modules}\nmodel, args = proj.model.build()", scope)
    exec(edit.get("after", ""), scope)
    model, args = scope["model"], scope["args"]
    shared = Walk()
    key = key_of(model, args, shared)
    result = {"name": edit["name"], "key": key.key, "reason": key.reason, "hit": False}
    if stored is not None and key.key is not None:
        old, record = stored
        if old.key != key.key:
            result["differ"] = sorted(explain_differences(old.factors, key.factors))
        else:
            result["reason"] = check_sources(record, shared, looked=edit.get("looked", False))
            result["hit"] = result["reason"] is None
    with SourceRecorder(shared) as recorder:
        result["graph"] = graph_text(model, args)
    result["unsound"] = recorder.unsound
    record = TargetRecord(graph_hash="0" * 64, sources=recorder.sources, globals=recorder.globals)
    return result, (key, record)


def in_child(folder, edit, stored):
    """Fork, run one edit, and hand its result back through a file."""
    out = Path(folder) / "result.pickle"
    child = os.fork()
    if child == 0:
        code = 0
        try:
            answer = run_edit(folder, edit, stored)
        except BaseException:  # noqa: BLE001 - the parent reports it
            answer = ({"name": edit["name"], "error": traceback.format_exc()}, None)
            code = 1
        out.write_bytes(pickle.dumps(answer))
        os._exit(code)
    os.waitpid(child, 0)
    return pickle.loads(out.read_bytes())


def prepared(edit):
    """A fresh copy of the project with a file edited."""
    folder = Path(tempfile.mkdtemp(prefix="proj-"))
    shutil.copytree(PROJECT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    if "file" in edit:
        path = folder / "proj" / edit["file"]
        text = path.read_text()
        if text.count(edit["old"]) != 1:
            raise SystemExit(f"{edit['name']}: {edit['old']!r} is not in the file once")
        path.write_text(text.replace(edit["old"], edit["new"]))
    return folder


def main():
    """Read edits from standard input, write results to standard output."""
    import torch
    import torch.export

    torch.set_num_threads(1)
    # What export imports at its first call is shared by all children.
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), strict=False)
    edits = json.load(sys.stdin)
    folder = prepared({})
    base, stored = in_child(folder, {"name": "base"}, None)
    shutil.rmtree(folder)
    results = [base]
    for edit in edits if stored is not None else ():
        folder = prepared(edit)
        results.append(in_child(folder, edit, stored)[0])
        shutil.rmtree(folder)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
