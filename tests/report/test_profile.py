"""Where a call's time goes: an entry is run here on made-up inputs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import stitchcache
from stitchcache.cache import Cache
from stitchcache.demo.decoder import ATTENTION, DecoderConfig, decoder_target
from stitchcache.errors import OptionError
from stitchcache.report.drawing import entry_page
from stitchcache.report.entry import read_entry
from stitchcache.report.profile import profile
from stitchcache.store.sources import unkept


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """A decoder of two layers, op by op."""
    cache = Cache(tmp_path_factory.mktemp("cache"))
    target = decoder_target(DecoderConfig(layers=2, width=16, heads=2), backend="eager")
    model, args, _ = target.made()
    options = {"dynamic_shapes": target.dynamic_shapes, "splitting_ops": [ATTENTION], "check": "none"}
    compiled = stitchcache.compile(model, args, backend="eager", cache=cache, **options)
    return cache, compiled.graph_hash


def run(cache, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stitchcache", *words, "--cache", str(cache.root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pieces_and_ops_are_timed(entry):
    cache, graph_hash = entry
    found = profile(cache, graph_hash, {"s0": 3, "s1": 9})
    assert found["sizes"] == {"s0": 3, "s1": 9}
    assert [piece["calls"] for piece in found["pieces"]] == [1, 1, 1]
    assert 0 < sum(piece["share"] for piece in found["pieces"]) <= 1.1
    assert found["between_seconds"] > 0
    pieces = {piece["key"] for piece in found["pieces"]}
    ops = {(row["op"], row["piece"] in pieces) for row in found["ops"]}
    # Attention runs between the pieces, the matrix products in them.
    assert (ATTENTION, False) in ops
    assert ("aten::addmm", True) in ops
    # What is run is a call like any other: made-up weights do not get into the cache.
    assert cache.verify().clean


def test_sizes_that_the_entry_does_not_cover(entry):
    cache, graph_hash = entry
    with pytest.raises(OptionError, match="s0=65: the entry covers 1 to 64"):
        profile(cache, graph_hash, {"s0": 65})
    with pytest.raises(OptionError, match="length: sizes that may vary are s0"):
        profile(cache, graph_hash, {"length": 3})


def test_the_command_names_what_registers_an_op(entry):
    cache, graph_hash = entry
    done = run(cache, "inspect", graph_hash[:8], "--profile")
    assert done.returncode == 1
    assert "Import the library that registers it" in done.stderr
    words = (
        "inspect",
        graph_hash[:8],
        "--profile",
        "--import",
        "stitchcache.demo.decoder",
        "--size",
        "s1",
        "4",
    )
    done = run(cache, *words)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "s0=16, s1=4" in done.stdout
    assert ATTENTION in done.stdout
    assert "SHARE" in done.stdout
    assert run(cache, "inspect", graph_hash[:8], "--profile", "--size", "s0", "x").returncode == 2
    missing = run(cache, "inspect", graph_hash[:8], "--profile", "--import", "no_such_ops")
    assert missing.returncode == 2
    said = "--import no_such_ops: it cannot be imported (ModuleNotFoundError: No module named 'no_such_ops')"
    assert missing.stderr.startswith(f"stitchcache: {said}")
    relative = run(cache, "inspect", graph_hash[:8], "--profile", "--import", ".ops")
    assert (relative.returncode, "Traceback" in relative.stderr) == (2, False)


def test_the_page_shows_it(entry):
    cache, graph_hash = entry
    found = profile(cache, graph_hash, {})
    page = entry_page(cache, read_entry(cache, graph_hash), found)
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["profile"] == json.loads(json.dumps(found))
    # The cold start that made the entry, as the cache counted it.
    assert data["last"]["stages"]["capture"] > 0
    assert data["last"]["said"].endswith("0 hits counted so far")
    # And how large values are, at any size.
    made = [step for step in data["variants"][0]["steps"] if step["kind"] == "piece"]
    assert made[0]["said"].startswith("float32[s0, s1, 16], ")
    assert '"profile":null' in entry_page(cache, read_entry(cache, graph_hash))


@pytest.mark.compile
def test_source_is_kept_and_shown(tmp_path):
    cache = Cache(tmp_path / "cache")
    build = lambda: (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval(), (torch.zeros(2, 8),))
    target = stitchcache.Target("net", build)
    first = stitchcache.prewarm(target, cache=cache, keep_sources=True).results[0]
    assert first.status == "compiled"
    assert unkept(cache.get(first.graph_hash), cache) == []
    shown = run(cache, "inspect", first.graph_hash[:8], "--source", "--piece", "submod_0")
    assert shown.returncode == 0, shown.stderr
    assert "AOTInductorModel" in shown.stdout
    assert "cpp_fused" in shown.stdout
    page = entry_page(cache, read_entry(cache, first.graph_hash), profile(cache, first.graph_hash, {}))
    assert "Generated source" in page
    assert "AOTInductorModel" in page
    assert len(page) < 1_500_000
    # It is in no key: who does not ask for it hits the same entry.
    assert stitchcache.prewarm(target, cache=cache).results[0].status == "direct"
    # As if it had been compiled without.
    cache.root.joinpath("pieces", first.graph_hash[:2], first.graph_hash).unlink()
    done = run(cache, "inspect", first.graph_hash[:8], "--source")
    assert done.returncode == 1
    assert "prewarm --keep-sources' keeps it" in done.stderr
    assert len(unkept(cache.get(first.graph_hash), cache)) == 1
