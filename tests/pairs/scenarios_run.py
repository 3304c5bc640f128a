"""Runs one side of all scenarios: forks from an interpreter that has torch, one child for each.

``scenarios_run.py first|second DIRECTORY NAME...`` prints a JSON object of name to result. Forks, because a
process that imports torch anew takes seconds. torch runs on one thread, so that a fork finds no team of
threads.
"""

import contextlib
import inspect
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from scenarios import SCENARIOS

import stitchcache
from stitchcache.errors import CacheMissError

KNOWN = inspect.signature(stitchcache.compile).parameters


def run(side, home, name):
    scenario = SCENARIOS[name]
    place = home / ("moved" if scenario.move and side == "second" else "project")
    os.chdir(place)
    sys.path.insert(0, str(place))
    sys.dont_write_bytecode = True
    space = {"OLD": scenario.files}
    exec(scenario.first if side == "first" else scenario.before, space)
    import net

    if side == "second":
        exec(scenario.after, space)
    model, args = net.build()
    with torch.no_grad():
        expected = model(*args)
    result = {"eager": expected.tolist(), "hit": None, "off": None}
    cache = stitchcache.Cache(home / "cache")
    more = {"check": "none"} | ({} if side == "first" else {"on_miss": "error", "require": "direct"})
    try:
        more = {name: value for name, value in more.items() if name in KNOWN}
        compiled = stitchcache.compile(model, args, backend="eager", cache=cache, **more)
    except CacheMissError as error:
        result["off"] = str(error)
        return result
    if side == "second" and compiled.cache_hit != "direct":
        result["off"] = str(compiled.explain())
        return result
    result["hit"] = compiled.cache_hit
    result["got"] = compiled(*args).tolist()
    return result


def forked(side, home, name):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            for variable, value in (SCENARIOS[name].env if side == "second" else {}).items():
                os.environ[variable] = value
            with contextlib.redirect_stdout(io.StringIO()):
                result = run(side, home, name)
        except BaseException:  # noqa: BLE001 - a child reports whatever happens in it
            result = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as out:
            json.dump(result, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as source:
        text = source.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the child died"}


def main():
    side, directory, *names = sys.argv[1:]
    torch.set_num_threads(1)
    # Everything is imported once, here; a child would spend seconds on it.
    with tempfile.TemporaryDirectory() as root:
        cache, model = stitchcache.Cache(root), torch.nn.Flatten(0).eval()
        stitchcache.compile(model, (torch.zeros(2, 3),), backend="eager", cache=cache)
    results = {name: forked(side, Path(directory) / str(i), name) for i, name in enumerate(names)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
