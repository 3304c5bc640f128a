# ruff: noqa: F401 - modules register their pairs
"""Pairs of models that a key could take for one another: no direct hit may serve the wrong one.

Each pair is built and called eagerly first: a pair whose results are equal proves nothing, and fails. The
first model is compiled with ``check="none"``, so that keys and recorded sources stand alone; then the second
one is looked up directly.
"""

import contextlib
import inspect
import os

import pairs_code
import pairs_identity
import pairs_process
import pairs_tensors
import pairs_torch
import pairs_values
import pytest
import torch
from pairs_base import PAIRS

import stitchcache
from stitchcache.errors import CacheMissError, StitchCacheError

FULL = os.environ.get("STITCHCACHE_FULL") == "1"

OUT_OF_REACH: dict[str, str] = {
    "identity: equal text": "Python may make two equal texts one object",
    "scalars: device with an index": "an entry runs on any device of its type",
    "process: name of the process": "code of the library answers from its own state",
    "process: system asked by a held partial": "code made in C calls it, which nobody sees",
    "process: address in a text": "an object's own text may hold its address",
    "process: default of a library class": "a method of the library was changed",
    "tensors: buffer view or base": "whether a tensor is a part of another says nothing of its values",
    "tensors: given view or base": "whether a tensor is a part of another says nothing of its values",
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


def first_is_compiled(name, cache):
    """Compile the first model of a pair, and tell whether it was not refused."""
    with built(name, False) as first:
        try:
            compiled(first, cache)
        except StitchCacheError:
            # A model that is refused is served to nobody.
            return False
    return True


@pytest.mark.parametrize("name", PAIRS)
def test_the_second_is_never_served_the_first(name, tmp_path):
    cache = stitchcache.Cache(tmp_path)
    with built(name, False) as first:
        expected_first = eager(first)
    with built(name, True) as second:
        assert not equal(eager(second), expected_first), "a void pair: eager gives the same"
    if not first_is_compiled(name, cache):
        pytest.skip("the first model is refused")
    with built(name, True) as second:
        expected, right = eager(second), True
    with built(name, True) as second:
        try:
            served = compiled(second, cache, on_miss="error", require="direct")
        except StitchCacheError:
            pass
        else:
            right = equal(results(served(*second.args, **second.kwargs)), expected)
    assert right or name in OUT_OF_REACH, "a wrong direct hit"
    assert not right or name not in OUT_OF_REACH, "keys tell these apart now: it is not out of reach"


@pytest.mark.parametrize("name", PAIRS if FULL else OUT_OF_REACH)
def test_the_look_lets_none_through(name, tmp_path):
    cache = stitchcache.Cache(tmp_path)
    if not first_is_compiled(name, cache):
        pytest.skip("the first model is refused")
    with built(name, True) as second:
        expected = eager(second)
    with built(name, True) as second:
        try:
            served = compiled(second, cache, check="example")
            got = results(served(*second.args, **second.kwargs))
        except StitchCacheError:
            # Refused by the look, or by the contract at the call.
            return
        assert served.check.state in {"agreed", "unchecked"}, served.check
        assert equal(got, expected), served.check
