"""What a compilation says while it runs: to a function, on stderr, and to the log."""

from __future__ import annotations

import logging

import models
import pytest

import stitchcache


@pytest.fixture
def compiled_with(tmp_path):
    def compiled(**more):
        options = models.decoder_options(cache=stitchcache.Cache(tmp_path), **more)
        return stitchcache.compile(models.decoder(), (models.ids(),), **options)

    return compiled


def test_a_function_a_bar_and_the_log(compiled_with, capsys, caplog):
    seen: list[stitchcache.Progress] = []
    with caplog.at_level(logging.INFO, logger="stitchcache"):
        compiled_with(on_progress=seen.append)
    assert [p.stage for p in seen if p.stage != "compile"] == ["lookup", "capture", "store", "done"]
    assert seen[-1].target == "Decoder"
    begun, compiling, done = [r.getMessage() for r in caplog.records if r.name == "stitchcache"]
    assert "no direct hit (no entry for this target): capturing the model" in begun
    assert "compiling 3 of 3 different pieces with eager" in compiling
    assert "compiled" in done
    # A direct hit shows nothing, and a bar that nobody can see is lines.
    compiled_with(on_progress="bar")
    assert capsys.readouterr().err == ""
    compiled_with(on_progress="bar", key_factors={"another": 1})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Decoder: capture"
    compiled_with(on_progress="bar", key_factors={"another": 2}, splitting_ops=[])
    assert "Decoder: compile 0/1" in capsys.readouterr().err.splitlines()


def test_timings_print_rounded(compiled_with):
    timings = compiled_with().timings
    assert all(len(repr(seconds)) <= 12 for seconds in timings.values()), timings
