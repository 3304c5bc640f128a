"""A module of the user's, which pairs patch and read."""

import functools

SOURCE = 2.0
KEPT: list[object] = []


class Scale:
    def __init__(self, by):
        self.by = by

    @property
    def factor(self):
        return self.by

    def apply(self, x):
        return x * self.by

    __call__ = apply


class Cached:
    value = 2.0

    @functools.lru_cache  # noqa: B019 - a cache that outlives its object is what is tested
    def look_up(self, key):
        return self.value


class Lazy:
    def __init__(self, value):
        self.value = value

    @functools.cached_property
    def doubled(self):
        return self.value * 2


def power(x, by=1.0, plus=0.0):
    return x * by + plus


def length(x):
    return x * len("ab")


def by_globals(x):
    return x * globals()["SOURCE"]


@functools.lru_cache
def cached():
    return SOURCE
