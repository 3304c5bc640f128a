"""``stitchcache inspect``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_entries import CODE, entry_file, key, put

from stitchcache.cache import Cache
from stitchcache.types import CALLER_MARK, Artifact, PieceRef, Variant

LEGACY = Path(__file__).parents[1] / "data" / "legacy"


@pytest.fixture
def root(tmp_path):
    put(tmp_path, key("a"), "Decoder")
    return tmp_path


def test_the_overview(run_cli, root):
    outcome = run_cli("inspect", key("a")[:6], "--cache", root)
    assert outcome.status == 0, outcome.err
    facts = dict(line.split("  ", 1) for line in outcome.out.splitlines() if "  " in line and line[0] != " ")
    assert facts["graph hash"].strip() == key("a")
    assert facts["torch"].strip() == "2.13.0+cpu"
    assert facts["pieces"].strip() == "3 calls of 2 different"
    assert facts["file"].strip() == str(entry_file(root, key("a")))
    text = " ".join(outcome.out.split())
    assert "ids int64[s0, s1] cpu batch['mask'] bool[s0, 4] cuda strides (1, s0)" in text
    assert "count int s0 + 1 flag must be True" in text
    assert "s0 1..64 (rows) s1 2 and more must hold s0 <= 2*s1" in text
    assert "returns * writes to buffer cache.k writes to input batch['mask']" in text
    assert "submod_2, submod_4" in text


def test_what_pieces_do_with_the_gil(run_cli, tmp_path):
    cache = Cache(tmp_path)
    blobs = {"aoti": b"a library" + CALLER_MARK, "eager": b"a graph", "inductor": b"a pickle"}
    pieces = [
        PieceRef(name=f"submod_{number}", key=key(backend), backend=backend, blob=cache.put_blob(data))
        for number, (backend, data) in enumerate(blobs.items())
    ]
    other = PieceRef(
        name="submod_3", key=key("older"), backend="aoti", blob=cache.put_blob(b"an older library")
    )
    names = tuple(piece.name for piece in [*pieces, other])
    variant = Variant(size_range=None, code=CODE, submod_names=names, consts=None, pieces=(*pieces, other))
    cache.put(Artifact(graph_hash=key("g"), variants=(variant,)))
    lines = run_cli("inspect", key("g"), "--cache", tmp_path).out.splitlines()
    said = {line.split()[-1]: line for line in lines if line.split()[-1:] and line.split()[-1] in names}
    words = ["let go", "by op", "kept", "kept"]
    assert [word in said[name] for word, name in zip(words, names, strict=True)] == [True] * 4, lines


def test_parts(run_cli, root):
    prefix = key("a")[:6]
    assert run_cli("inspect", prefix, "--code", "--cache", root).out == CODE
    pieces = run_cli("inspect", prefix, "--pieces", "--cache", root).out.splitlines()
    assert [line.split()[0] for line in pieces] == ["NAME", "submod_0", "submod_2", "submod_4"]
    assert [line.split()[-1] for line in pieces[1:]] == ["1", "2", "2"]
    bindings = run_cli("inspect", prefix, "--bindings", "--cache", root).out
    assert "head.weight" in bindings
    assert "the same tensor as embedding.weight" in bindings
    factors = run_cli("inspect", prefix, "--factors", "--wide", "--cache", root).out
    assert key("torch") in factors


def test_json_has_everything(run_cli, root):
    record = run_cli("inspect", key("a"), "--json", "--cache", root).json
    assert record["graph_hash"] == key("a")
    assert record["created"] == 1_700_000_000.0
    assert record["pieces"][1]["shared_by"] == 2
    assert record["input"]["symbols"][0] == {"name": "s0", "min": 1, "max": 64, "label": "rows"}
    assert record["variants"][0]["code"] == CODE
    assert record["factors"][0]["digest"] == key("torch")


def test_size_ranges(run_cli, tmp_path):
    put(tmp_path, key("r"), "Ranged", ranged=True)
    out = run_cli("inspect", key("r")[:8], "--pieces", "--cache", tmp_path).out
    assert "1..8" in out
    assert "9..64" in out
    code = run_cli("inspect", key("r")[:8], "--code", "--cache", tmp_path).out
    assert code.count("# sizes:") == 2


@pytest.mark.parametrize("prefix", ["d6", "a116c9", "239f"])
def test_old_formats(run_cli, tmp_path, prefix):
    for file in [*LEGACY.glob("*.pkl"), *LEGACY.glob("*.msgpack")]:
        shutil.copy(file, tmp_path)
    outcome = run_cli("inspect", prefix, "--cache", tmp_path)
    assert outcome.status == 0, outcome.err
    assert "made through the engine API" in outcome.out
    assert "def execution_fn" in run_cli("inspect", prefix, "--code", "--cache", tmp_path).out
    assert run_cli("inspect", prefix, "--json", "--cache", tmp_path).json["input"] is None


def test_no_such_entry(run_cli, root):
    outcome = run_cli("inspect", "0123", "--cache", root)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == f"stitchcache: no entry in {root} begins with 0123\n"
    assert run_cli("inspect", "no-hash", "--cache", root).status == 1


def test_an_ambiguous_prefix_names_its_candidates(run_cli, tmp_path):
    put(tmp_path, "ab" + "0" * 62, "First")
    put(tmp_path, "ab" + "1" * 62, "Second")
    outcome = run_cli("inspect", "ab", "--cache", tmp_path)
    assert outcome.status == 1
    assert "ab" + "0" * 62 + "  First" in outcome.err
    assert "ab" + "1" * 62 + "  Second" in outcome.err


def test_a_damaged_entry_is_named_and_left(run_cli, root):
    file = entry_file(root, key("a"))
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    outcome = run_cli("inspect", key("a")[:6], "--cache", root)
    assert outcome.status == 1
    assert str(file) in outcome.err
    assert file.read_bytes() == data


def test_looking_is_no_use(run_cli, root):
    file = entry_file(root, key("a"))
    before = file.stat().st_mtime_ns
    run_cli("inspect", key("a")[:6], "--cache", root)
    assert file.stat().st_mtime_ns == before
    assert "hit" not in run_cli("stats", "--cache", root).out


def test_code_is_coloured_on_a_terminal(run_on_terminal, root):
    shown = run_on_terminal("inspect", key("a")[:6], "--code", "--cache", root)
    assert "\x1b[" in shown
    assert "execution_fn" in shown


def test_debug_shows_where(root):
    import subprocess
    import sys

    from cli_environment import environment

    done = subprocess.run(
        [sys.executable, "-m", "stitchcache", "inspect", "0123", "--cache", str(root)],
        env=environment(STITCHCACHE_DEBUG="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in done.stderr
    assert "GraphHashError" in done.stderr
