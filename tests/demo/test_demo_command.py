"""``stitchcache demo``, from the command to its child processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stitchcache.cli.demo import run_child

SMALL = {"layers": 2, "width": 16, "heads": 2, "vocabulary": 32}


def demo(*options: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    import os

    package = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "stitchcache", "demo", *map(str, options)],
        env={**os.environ, "PYTHONPATH": package, **(env or {})},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def eager_demo(tmp_path_factory):
    """One demo without a compiler: its record and its cache."""
    root = tmp_path_factory.mktemp("demo")
    sizes = [word for name in ("layers", "width") for word in (f"--{name}", SMALL[name])]
    done = demo(*sizes, "--backend", "eager", "--runs", 1, "--json", "--cache", root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), root, done.stderr


def test_what_it_measures(eager_demo):
    record, root, _ = eager_demo
    assert record["schema"] == 1
    assert [row["name"] for row in record["rows"]] == ["eager", "cold", "warm"]
    for row in record["rows"]:
        assert row["process_seconds"] > row["model_seconds"] > 0
        assert row["call_microseconds"] > 0
    assert record["hits"] == ["direct"]
    assert record["difference"] == 0
    assert record["compilers"] == []
    assert (record["pieces"], record["distinct"]) == (3, 3)
    assert record["bytes"] == sum(
        file.stat().st_size
        for area in ("entries", "blobs", "targets", "pieces")
        for file in (root / area).rglob("*")
        if file.is_file()
    )


def test_progress_is_told(eager_demo):
    _, _, said = eager_demo
    assert "layers: capture\n" in said
    assert "layers: compile 3/3\n" in said


def test_its_cache_can_be_looked_at(eager_demo):
    record, root, _ = eager_demo
    done = subprocess.run(
        [sys.executable, "-m", "stitchcache", "ls", "--json", "--cache", str(root)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    (entry,) = json.loads(done.stdout)["entries"]
    assert entry["graph_hash"] == record["graph_hash"]


def test_a_cache_that_has_it_is_not_called_cold(eager_demo):
    _, root, _ = eager_demo
    done = demo("--layers", 2, "--width", 16, "--backend", "eager", "--runs", 1, "--cache", root)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[1:4]]
    assert names == ["eager", "first", "warm"]
    assert f"stitchcache ls --cache {root}" in done.stdout


def test_usage():
    done = demo("--width", 65)
    assert done.returncode == 2
    assert "--width 65 is no multiple of 4" in done.stderr


def test_no_compiler_is_one_message(tmp_path):
    done = demo("--layers", 1, "--runs", 1, "--cache", tmp_path, env={"CXX": "no-such-compiler"})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "needs a C++ compiler" in done.stderr.splitlines()[-1]
    assert "backend='eager'" in done.stderr


def test_a_child_that_dies_is_reported(tmp_path, capfd):
    job = {"config": {"colour": 3}, "backend": "aoti", "cache": str(tmp_path)}
    with pytest.raises(click.exceptions.Exit):
        run_child(job, "eager", "cold")
    assert "colour" in capfd.readouterr().err


@pytest.mark.compile
def test_with_a_compiler(compiled_root):
    root = compiled_root / "demo"
    done = demo("--layers", 1, "--runs", 1, "--json", "--cache", root)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["hits"] == ["direct"]
    assert record["compilers"] == []
    assert 0 <= record["difference"] < 1e-4
    assert (record["pieces"], record["distinct"]) == (2, 2)
