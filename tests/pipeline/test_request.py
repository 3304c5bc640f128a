"""Options are checked once, where they come from notwithstanding; a site tells how far a start has come."""

from __future__ import annotations

import time

import pytest

import stitchcache
from stitchcache.errors import OptionError
from stitchcache.pipeline.find import Request, Site


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"require": "graph"}, "require='graph'.*direct"),
        ({"check": "always"}, "check='always'.*example, background, none"),
        ({"on_miss": "shrug"}, "on_miss"),
        ({"options": {"stitchcache.jobs": 0}}, "jobs=0.*at least one"),
        ({"options": {"stitchcache.jobs": -2}}, "jobs=-2"),
        ({"options": {"stitchcache.jobs": True}}, "stitchcache.jobs"),
        (
            {"backend": "eager", "options": {"max_autotun": 1}},
            r"max_autotun.*'eager' has only stitchcache\.jobs",
        ),
        ({"key_factors": 3}, "key_factors is a int"),
    ],
)
def test_what_makes_no_sense(options, words):
    with pytest.raises(OptionError, match=words):
        Request(**options)


@pytest.mark.parametrize(
    ("value", "miss_is_error", "must_be_direct"),
    [
        ("", False, False),
        ("0", False, False),
        ("1", True, False),
        ("direct", True, True),
        ("Direct", True, True),
    ],
)
def test_what_the_environment_requires(monkeypatch, value, miss_is_error, must_be_direct):
    monkeypatch.setenv("STITCHCACHE_REQUIRE", value)
    request = Request()
    assert (request.miss_is_error, request.must_be_direct) == (miss_is_error, must_be_direct)


def test_what_an_argument_requires():
    assert Request(on_miss="error").miss_is_error
    assert not Request(on_miss="error").must_be_direct
    assert Request(require="direct").miss_is_error
    assert Request(require="direct").must_be_direct


def test_an_environment_that_makes_no_sense(monkeypatch):
    monkeypatch.setenv("STITCHCACHE_REQUIRE", "perhaps")
    with pytest.raises(OptionError, match="STITCHCACHE_REQUIRE"):
        _ = Request().miss_is_error
    monkeypatch.setenv("STITCHCACHE_CHECK", "perhaps")
    with pytest.raises(OptionError, match="STITCHCACHE_CHECK"):
        _ = Request().checked


def test_when_a_hit_is_checked(monkeypatch):
    monkeypatch.delenv("STITCHCACHE_CHECK", raising=False)
    assert Request().checked == "example"
    monkeypatch.setenv("STITCHCACHE_CHECK", "none")
    assert Request().checked == "none"
    assert Request(check="background").checked == "background", "an argument is nearer than the environment"


def test_a_site_adds_up_and_tells(tmp_path):
    told = []
    site = Site(
        cache=stitchcache.Cache(tmp_path),
        label="model",
        device="cpu",
        devices=("cpu",),
        on_progress=told.append,
    )
    assert site.timed("load", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        site.timed("load", lambda: 1 / 0)
    site.tell("compile", 1, 4, 2.5)
    assert list(site.timings) == ["load"]
    (progress,) = told
    assert (progress.target, progress.stage, progress.done, progress.total, progress.left) == (
        "model",
        "compile",
        1,
        4,
        2.5,
    )
    assert 0 <= progress.seconds <= time.perf_counter() - site.began
