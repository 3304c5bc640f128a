"""Models of transformers on both roads: one process compiles, the next hits and equals eager."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.examples, pytest.mark.compile]

SCRIPT = Path(__file__).with_name("hf_models.py")
ROOT = SCRIPT.parents[2]
ROADS = ["compile", "torch-compile"]
NAMES = ["llama", "qwen3", "bert", "gpt2", "vit", "resnet"]
SPLIT = {"llama", "qwen3", "gpt2"}


def run(road, names, cache, home, seed):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "STITCHCACHE_DIR": str(cache),
        "PYTHONHASHSEED": seed,
        "HOME": str(home),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), road, *names],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session", params=ROADS)
def processes(request, compiled_root, tmp_path_factory):
    """A road, and what a first and a second process said of each model."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'stitchcache[examples]'")
    road = request.param
    first = run(road, NAMES, compiled_root, tmp_path_factory.mktemp("home"), "1")
    # The second process has another hash seed, home and directory, and another model beside.
    beside = [f"{name}+{'gpt2' if name == 'bert' else 'bert'}" for name in NAMES]
    return road, first, run(road, beside, compiled_root, tmp_path_factory.mktemp("home"), "2")


@pytest.fixture(params=NAMES)
def started(request, processes):
    """A model's name and road, and what both processes said."""
    road, first, second = processes
    said = (first[request.param], second[request.param])
    for one in said:
        assert "error" not in one, one["error"]
    return request.param, road, *said


def test_the_second_process_hits(started):
    _, road, first, second = started
    # In a shared cache another test may have compiled the same.
    assert first["hit"] in (None, "graph", "direct")
    assert second["hit"] == ("direct" if road == "compile" else "graph")
    assert second["graph_hash"] == first["graph_hash"] != ""


def test_both_processes_equal_eager_at_all_sizes(started):
    _, _, first, second = started
    assert max(first["differences"] + second["differences"]) < 1e-4


def test_a_direct_hit_imports_no_compiler(started):
    name, road, _, second = started
    if road != "compile":
        pytest.skip("torch.compile is Dynamo")
    if name == "bert":
        pytest.skip("pieces of the inductor backend are Inductor's own objects, which import it")
    assert second["imported"] == []
    # Code objects were kept: no source is parsed but that of pieces of the eager backend.
    assert second["parsed"] == (name != "vit")


def test_layers_share_pieces(started):
    name, road, first, _ = started
    if road == "compile":
        assert first["pieces"] == (3 if name in SPLIT else 1)
        assert first["distinct"] <= first["pieces"]
