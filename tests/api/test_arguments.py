"""Arguments of wrong types: the error names the argument and says what to give."""

import contextlib

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


class Odd:
    def __repr__(self):
        return "Odd()"


JUNK = [
    None,
    True,
    5,
    -1,
    0.5,
    "x",
    "",
    b"x",
    [],
    [5],
    [None],
    (),
    {},
    {"x": 5},
    {5: 5},
    {"a": Odd()},
    Odd(),
    Odd,
]
JUNK += [torch.ones(1), torch.nn.ReLU, len, float("nan"), object()]
OF_COMPILE = [
    *(
        "model",
        "args",
        "kwargs",
        "dynamic_shapes",
        "splitting_ops",
        "size_ranges",
        "backend",
        "cache",
        "on_miss",
    ),
    *("on_mismatch", "require", "check", "key_factors", "options", "preloaded", "on_progress"),
]


def only_ours(call, *args, **kwargs):
    """Call something with junk; whatever it raises is an error of ours."""
    with contextlib.suppress(stitchcache.errors.StitchCacheError):
        call(*args, **kwargs)


@pytest.mark.parametrize("name", OF_COMPILE)
def test_junk_for_compile(given, name):
    model, args, more = given
    for junk in JUNK:
        if name == "on_progress" and callable(junk):
            # What a function of the user's raises is theirs.
            continue
        words = {"model": model, "args": args, **more, "require": "direct", name: junk}
        only_ours(stitchcache.compile, **words)


def test_junk_that_only_a_trace_meets(given):
    model, args, more = given
    for junk in [5, "x", {5: 5}, {"input": 5}, [5], [{5: 5}], [{0: Odd()}], {"input": {0: "b"}}, [[5]]]:
        only_ours(stitchcache.compile, model, args, **more, dynamic_shapes=junk, on_miss="error")
    for junk in [
        (),
        ("x",),
        (Odd(),),
        ([],),
        (args[0], 5),
        (None,),
        (torch.ones(3, 5),),
        (torch.ones(1, 2).half(),),
    ]:
        only_ours(stitchcache.compile, model, junk, **more, on_miss="error")
    for kwargs in ({"nope": 5}, {"input": args[0]}, {5: 5}):
        only_ours(stitchcache.compile, model, args, kwargs, **more, on_miss="error")


def test_junk_for_the_others(given):
    model, args, more = given
    cache = more["cache"]
    compiled = stitchcache.compile(model, args, **more)
    for junk in JUNK:
        for call in (
            lambda junk: stitchcache.load(junk, model, cache=cache),
            lambda junk: stitchcache.load("0", junk, cache=cache),
            lambda junk: stitchcache.load("0", model, cache=junk),
            lambda junk: stitchcache.prewarm(junk, cache=cache),
            lambda junk: stitchcache.prewarm([], jobs=junk, cache=cache),
            lambda junk: stitchcache.prewarm([], on_miss=junk, cache=cache),
            lambda junk: stitchcache.Target(junk, list),
            lambda junk: stitchcache.Target("a", junk),
            lambda junk: stitchcache.Target("a", list, torch_compile=junk),
            lambda junk: stitchcache.prewarm(
                stitchcache.Target("a", lambda given=junk: given, backend="eager"), cache=cache
            ),
            lambda junk: stitchcache.prewarm(
                stitchcache.Target("a", lambda given=(junk, junk): given, backend="eager"), cache=cache
            ),
            lambda junk: stitchcache.Cache(junk),
            lambda junk: stitchcache.Cache(cache.root, max_bytes=junk),
            lambda junk: stitchcache.Cache(cache.root, durability=junk),
            lambda junk: cache.get(junk),
            lambda junk: cache.find(junk),
            lambda junk: cache.latest(junk),
            lambda junk: stitchcache.SizeRange(junk, 5),
            lambda junk: stitchcache.SizeRange(1, 5, dim=junk),
            lambda junk: stitchcache.Dim(junk),
            lambda junk: stitchcache.Dim("a", junk),
            lambda junk: stitchcache.Dim("a", 1, junk),
            lambda junk: stitchcache.verify(junk, compiled, args),
            lambda junk: stitchcache.verify(model, compiled, junk),
            lambda junk: stitchcache.verify(model, compiled, args, junk),
            lambda junk: compiled.rebind(junk),
            lambda junk: compiled(junk),
            lambda junk: compiled(*args, junk),
            lambda junk: compiled(args[0], x=junk),
        ):
            only_ours(call, junk)
    for junk in (5, b"x", [], object()):
        only_ours(stitchcache.preload, junk)


def test_a_misspelt_option_is_found_before_the_trace(given):
    model, args, more = given
    with pytest.raises(OptionError, match=r"options\['max_autotun'\].*did you mean max_autotune"):
        stitchcache.compile(model, args, cache=more["cache"], options={"max_autotun": True})
