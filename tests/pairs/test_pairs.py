# ruff: noqa: F401 - modules register their pairs
"""Pairs of models that a key could take for one another: no direct hit may serve the wrong one.

Each pair is built and called eagerly first: a pair whose results are equal proves nothing, and fails. The
first model is compiled with ``check="none"``, so that keys and recorded sources stand alone; then the second
one is looked up directly.
"""

import contextlib
import inspect

import pairs_code
import pairs_identity
import pairs_torch
import pairs_values
import pytest
import torch
from pairs_base import PAIRS

import stitchcache
from stitchcache.errors import CacheMissError, StitchCacheError

OUT_OF_REACH: dict[str, str] = {
    "identity: equal text": "Python may make two equal texts one object",
    "identity: parameter's offset": "where in memory weights lie follows from how they were loaded",
    "identity: parameter's storage": "where in memory weights lie follows from how they were loaded",
    "scalars: device with an index": "an entry runs on any device of its type",
    "torch: metadata version": "how often a tensor was written says nothing of its values",
    "torch: metadata shared memory": "where in memory weights lie follows from how they were loaded",
    "torch: metadata size of the storage": "where in memory weights lie follows from how they were loaded",
}
"""Pairs that keys cannot tell apart, each with its reason in docs/keys.md; the look tells them."""


class Patch(pytest.MonkeyPatch):
    """Undoes more than attributes."""

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.callback, self.enter = self.stack.callback, self.stack.enter_context

    def undo(self):
        super().undo()
        self.stack.close()


@contextlib.contextmanager
def built(name, other):
    patch = Patch()
    try:
        made = PAIRS[name](other, patch)
        made.model.eval() if made.model.training and "training" not in name else None
        made.model.training = False
        yield made
    finally:
        patch.undo()


def results(value):
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    return spec, [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def equal(one, other):
    if one[0] != other[0]:
        return False
    pairs = zip(one[1], other[1], strict=True)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a == b
        for a, b in pairs
    )


def eager(made):
    with torch.no_grad():
        return results(made.model(*made.args, **made.kwargs))


def compiled(made, cache, **more):
    options = {"backend": "eager", "check": "none", **made.options, **more}
    known = inspect.signature(stitchcache.compile).parameters
    options = {name: value for name, value in options.items() if name in known}
    served = stitchcache.compile(made.model, made.args, made.kwargs, cache=cache, **options)
    if more.get("require") == "direct" and served.cache_hit != "direct":
        raise CacheMissError("a hit that traces", target="", reason="")
    return served


@pytest.mark.parametrize("name", PAIRS)
def test_the_second_is_never_served_the_first(name, tmp_path):
    cache = stitchcache.Cache(tmp_path)
    with built(name, False) as first:
        expected_first = eager(first)
    with built(name, False) as first:
        try:
            compiled(first, cache)
        except StitchCacheError:
            # A model that is refused is served to nobody.
            refused = True
        else:
            refused = False
    with built(name, True) as second:
        expected = eager(second)
    assert not equal(expected, expected_first), "a void pair: eager gives the same"
    if refused:
        pytest.skip("the first model is refused")
    with built(name, True) as second:
        try:
            served = compiled(second, cache, on_miss="error", require="direct")
        except (CacheMissError, StitchCacheError):
            return
        got = results(served(*second.args, **second.kwargs))
    if name in OUT_OF_REACH and not equal(got, expected):
        pytest.xfail(OUT_OF_REACH[name])
    assert equal(got, expected), "a wrong direct hit"
