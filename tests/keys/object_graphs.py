"""Object graphs made from recipes, with sharing and cycles: for tests of how keys write values.

    python object_graphs.py COUNT

prints the digest of as many graphs, the same ones in every process.
"""

import collections
import enum
import functools
import hashlib
import json
import random
import sys
import types

import numpy as np
import torch

from stitchcache.keys.walk import Walk


class Plain:
    pass


class Slots:
    __slots__ = ("a", "b")


class Listed(list):
    pass


class Named(dict):
    __slots__ = ("a", "b")


class Counted(int):
    pass


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


Pair = collections.namedtuple("Pair", "a b")


def closed(value):
    def inner():
        return value

    return inner


def set_state(made, parts):
    for name, part in zip("ab", parts, strict=False):
        setattr(made, name, part)


def update(made, parts):
    made.update(enumerate(parts))


# name: makes an empty one; fills it with parts
MUTABLE = {
    "list": (list, lambda made, parts: made.extend(parts)),
    "dict": (dict, update),
    "listed": (Listed, lambda made, parts: (made.extend(parts[1:]), set_state(made, parts[:1]))),
    "named": (Named, lambda made, parts: (made.update(enumerate(parts[1:])), set_state(made, parts[:1]))),
    "ordered": (collections.OrderedDict, update),
    "default": (functools.partial(collections.defaultdict, list), update),
    "other default": (
        functools.partial(collections.defaultdict, int), update),
    "deque": (collections.deque, lambda made, parts: made.extend(parts)),
    "short deque": (functools.partial(collections.deque, maxlen=9), lambda made, parts: made.extend(parts)),
    "plain": (Plain, set_state),
    "slots": (Slots, set_state),
    "namespace": (types.SimpleNamespace, set_state),
    "sentinel": (object, lambda made, parts: None),
}  # fmt: skip
FIXED = {
    "tuple": tuple,
    "pair": lambda parts: Pair(parts, len(parts)),
    "partial": lambda parts: functools.partial(max, *parts),
    "closed": lambda parts: closed(tuple(parts)),
    "frozenset": lambda parts: frozenset(range(len(parts))),
    "slice": lambda parts: slice(len(parts)),
    "array": lambda parts: np.arange(len(parts)),
    "turned array": lambda parts: np.zeros((2, len(parts) + 2)).T,
    "tensor": lambda parts: torch.arange(len(parts)),
    "member": lambda parts: Kind.ONE if parts else Kind.TWO,
    "counted": lambda parts: Counted(len(parts)),
    "proxy": lambda parts: types.MappingProxyType({"a": tuple(parts)}),
}
SCALARS = [None, True, 0, 1, 2, 1.0, -0.0, 0.0, "", "a", "b", b"a", 1j, 10**30, ..., torch.float32, len, int]


def build(recipe, made=None):
    """A value from a scalar's index, a reference to what was made (``-1 - number``), or kind and parts."""
    made = [] if made is None else made
    if isinstance(recipe, int):
        if recipe >= 0:
            return SCALARS[recipe % len(SCALARS)]
        return made[-recipe % len(made)] if made else None
    kind, parts = recipe
    if kind in FIXED:
        return FIXED[kind]([build(part, made) for part in parts])
    empty, fill = MUTABLE[kind]
    value = empty()
    made.append(value)
    fill(value, [build(part, made) for part in parts])
    return value


def written(value):
    writer = Walk().writer("value")
    writer.put(value)
    return bytes(writer.out)


def random_recipe(rng, depth=0):
    if depth > 3 or rng.random() < 0.3:
        return rng.randrange(-6, len(SCALARS))
    kind = rng.choice([*MUTABLE, *FIXED])
    return kind, [random_recipe(rng, depth + 1) for _ in range(rng.randrange(4))]


if __name__ == "__main__":
    rng = random.Random(5)
    graphs = [random_recipe(rng) for _ in range(int(sys.argv[1]))]
    print(json.dumps([hashlib.sha256(written(build(graph))).hexdigest() for graph in graphs]))
