"""Looks every mutant of a source up in the cache of its original, each in a forked child.

``mutants_run.py MODULE FILE COUNT`` compiles ``MODULE.build()`` out of FILE once, and prints a JSON object:
mutants by outcome, and the names of those that were served a wrong result. Mutants are spread evenly over the
source. Each is written with its original's times. Every other one is imported, and then the original is put
back: its file is right, and what runs is not.
"""

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from mutants import mutants
from torch.utils._pytree import tree_flatten

import stitchcache
from stitchcache.errors import StitchCacheError


def same(one, other):
    a, b = tree_flatten(one), tree_flatten(other)
    return a[1] == b[1] and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        else x == y
        for x, y in zip(a[0], b[0], strict=True)
    )


def compiled(module, cache, **more):
    model, args, kwargs = __import__(module).build()
    with torch.no_grad():
        expected = model(*args, **kwargs)
    options = {"backend": "eager", "cache": cache, "check": "none", **more}
    return stitchcache.compile(model, args, kwargs, **options), expected, (args, kwargs)


def outcome(module, cache, put_back):
    """In the child: what becomes of one mutant."""
    try:
        __import__(module).build()
        put_back()
    except BaseException:  # noqa: BLE001 - a mutant may raise anything
        return "broken"
    try:
        made, expected, (args, kwargs) = compiled(module, cache, on_miss="error", require="direct")
    except StitchCacheError:
        return "miss"
    except BaseException:  # noqa: BLE001
        return "broken"
    return "right" if same(made(*args, **kwargs), expected) else "wrong"


def forked(work):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        result = work()
        with os.fdopen(write, "w") as out:
            out.write(result)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as source:
        text = source.read()
    os.waitpid(child, 0)
    return text or "broken"


def main():
    module, file, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        # What the source imports is imported once, not in each child.
        __import__(sys.argv[4])
    torch.set_num_threads(1)
    # Everything is imported once, here; a child would spend seconds on it.
    with tempfile.TemporaryDirectory() as root:
        cache, model = stitchcache.Cache(root), torch.nn.Flatten(0).eval()
        stitchcache.compile(model, (torch.zeros(2, 3),), backend="eager", cache=cache)
    sys.dont_write_bytecode = True
    home = Path(tempfile.mkdtemp())
    sys.path.insert(0, str(home))
    place = home / f"{module}.py"
    shutil.copy2(file, place)
    cache = stitchcache.Cache(home / "cache")

    def first():
        made, expected, (args, kwargs) = compiled(module, cache)
        return "compiled" if same(made(*args, **kwargs), expected) else "wrong from the start"

    begun = forked(first)
    again = forked(lambda: outcome(module, cache, lambda: None))
    original, times = place.read_text(), place.stat()
    every = mutants(original)
    found, wrong = Counter(), []

    def write(text):
        place.write_text(text)
        os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))

    for index in range(min(count, len(every))):
        name, make = every[index * len(every) // count if count < len(every) else index]
        write(make())
        restored = index % 2 == 1
        result = forked(lambda back=restored: outcome(module, cache, lambda: back and write(original)))
        found[f"{result}, put back" if restored else result] += 1
        if result == "wrong":
            wrong.append(f"{name}{', put back' * restored}")
    shutil.rmtree(home)
    print(
        json.dumps({"begun": begun, "again": again, "possible": len(every), "found": found, "wrong": wrong})
    )


if __name__ == "__main__":
    main()
