"""Arguments of wrong types: the error names the argument and says what to give."""

import pytest
import torch

import stitchcache
from stitchcache.errors import OptionError


@pytest.fixture
def given(tmp_path):
    cache = stitchcache.Cache(tmp_path)
    return torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),), {"cache": cache, "backend": "eager"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size_ranges": [(1, 2)]}, r"size_ranges\[0\] is a tuple: give a stitchcache\.SizeRange"),
        ({"size_ranges": 5}, "size_ranges is a int: give a list"),
        ({"splitting_ops": "aten::mm"}, "splitting_ops is a str: give a list of names"),
        ({"key_factors": 5}, "key_factors is a int: give a dict"),
        ({"options": 5}, "options is a int: give a dict"),
        ({"kwargs": 5}, "kwargs is a int"),
        ({"preloaded": 5}, "preloaded is a int: give what stitchcache.preload"),
    ],
)
def test_compile(given, options, words):
    model, args, more = given
    with pytest.raises(OptionError, match=words):
        stitchcache.compile(model, args, **more, **options)


@pytest.mark.parametrize(
    ("targets", "options", "words"),
    [
        ([5], {}, "targets is a int: give Targets"),
        (5, {}, "targets is a int: give Targets"),
        ([], {"on_miss": "x"}, "on_miss='x'"),
        ([], {"on_progress": 5}, "on_progress is a int: give a function"),
        ([], {"jobs": "two"}, r"stitchcache\.jobs"),
    ],
)
def test_prewarm(given, targets, options, words):
    with pytest.raises(OptionError, match=words):
        stitchcache.prewarm(targets, cache=given[2]["cache"], **options)


def test_the_others(given):
    model, args, more = given
    compiled = stitchcache.compile(model, args, **more)
    for call, words in (
        (lambda: compiled.rebind(None), "model is a NoneType: give a torch.nn.Module"),
        (
            lambda: stitchcache.load(None, model, cache=more["cache"]),
            "source is a NoneType: give a graph hash",
        ),
        (lambda: stitchcache.load("0", None, cache=more["cache"]), "model is a NoneType"),
        (lambda: stitchcache.preload(5), "target is a int: give a Target"),
        (lambda: stitchcache.Target("a", 5), "build is a int: give a function"),
        (lambda: stitchcache.Target(5, list), "name is a int: give a name"),
        (lambda: stitchcache.verify(None, compiled, args), "model is a NoneType"),
        (lambda: stitchcache.verify(model, 5, args), "compiled is a int"),
        (lambda: stitchcache.verify(model, compiled, args[0]), "args is a Tensor: give a tuple"),
        (lambda: stitchcache.verify(model, compiled, args, 5), "kwargs is a int: give a dict"),
    ):
        with pytest.raises(OptionError, match=words):
            call()
