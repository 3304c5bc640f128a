"""Every file-system call that ``compile`` makes of the store fails in turn: what it returns is right."""

from __future__ import annotations

import errno
import gc
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hostile import Counting, Failing
from test_faults import ERRNOS

import stitchcache
import stitchcache.pipeline.trace

# Of so many calls, one is tried by default; STITCHCACHE_FULL=1 tries all of them, with every errno.
SAMPLED = {"direct": 1, "graph": 5, "cold": 9}


@pytest.fixture(scope="module")
def model():
    stitchcache.pipeline.trace._import_exporter()
    torch.manual_seed(0)
    return torch.nn.Linear(3, 3).eval()


@pytest.fixture(autouse=True)
def _quick_and_quiet(model, monkeypatch):
    # An export that only warms up imports, and has done so.
    monkeypatch.setattr(stitchcache.pipeline.trace, "_import_exporter", lambda: None)
    logger = logging.getLogger("stitchcache")
    monkeypatch.setattr(logger, "disabled", True)


INPUTS = (torch.ones(2, 3),)


def start(model, cache) -> str | None:
    """Compile or load, compare with eager; which road it was."""
    compiled = stitchcache.compile(model, INPUTS, backend="eager", cache=cache)
    torch.testing.assert_close(compiled(*INPUTS), model(*INPUTS), rtol=0, atol=0)
    return compiled.cache_hit


def prepare(road: str, model, root: Path) -> None:
    if road == "cold":
        root.mkdir()
        return
    assert start(model, stitchcache.Cache(root)) is None
    if road == "graph":
        shutil.rmtree(root / "targets")


def check(model, root: Path, road: str) -> None:
    gc.collect(0)
    cache = stitchcache.Cache(root)
    cache.verify(repair=True)
    assert cache.verify().clean
    if road != "cold":
        assert len(cache.entries()) == 1
    assert start(model, cache) in (("direct", "graph") if road != "cold" else ("direct", "graph", None))
    assert start(model, stitchcache.Cache(root)) == "direct"


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize("road", list(SAMPLED))
def test_compile_survives_every_failing_call(road, persistent, model, tmp_path, full):
    prepare(road, model, tmp_path / "base")
    counting = Counting()
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    hit = None if road == "cold" else road
    assert start(model, stitchcache.Cache(tmp_path / "dry", _files=counting)) == hit
    gc.collect(0)
    assert len(counting.calls) > 20
    for at in range(0, len(counting.calls), 1 if full else SAMPLED[road]):
        for number in ERRNOS if full else (ERRNOS[at % len(ERRNOS)],):
            root = tmp_path / "root"
            shutil.copytree(tmp_path / "base", root)
            try:
                start(model, stitchcache.Cache(root, _files=Failing(at, number, persistent=persistent)))
                check(model, root, road)
            except BaseException as error:
                what = f"{road}, call {at} ({counting.calls[at]}), {errno.errorcode[number]}"
                error.add_note(what)
                raise
            shutil.rmtree(root)


def test_a_piece_that_was_checked_and_cannot_be_opened_is_compiled_again(model, tmp_path, monkeypatch):
    """Loaders open files by themselves, out of reach of the calls that fail above."""
    from stitchcache.pieces.eager import EagerBackend

    prepare("direct", model, tmp_path / "cache")
    load, failures = EagerBackend.load, [0, 1, 2]

    def fail_thrice(self, path, device):
        if failures:
            failures.pop()
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return load(self, path, device)

    monkeypatch.setattr(EagerBackend, "load", fail_thrice)
    assert start(model, stitchcache.Cache(tmp_path / "cache")) in ("graph", None)
    assert start(model, stitchcache.Cache(tmp_path / "cache")) in ("direct", "graph", None)
