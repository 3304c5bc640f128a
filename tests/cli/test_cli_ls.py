"""``stitchcache ls``."""

from __future__ import annotations

import shutil
from pathlib import Path

from cli_entries import entry_file, key, put

LEGACY = Path(__file__).parents[1] / "data" / "legacy"


def test_an_empty_cache_is_no_finding(run_cli, tmp_path):
    outcome = run_cli("ls", "--cache", tmp_path)
    assert (outcome.status, outcome.out) == (0, "")
    assert "no entries in" in outcome.err
    assert run_cli("ls", "--json", "--cache", tmp_path).json["entries"] == []


def test_the_default_cache_is_the_environments(run_cli, tmp_path):
    put(tmp_path, key("a"), "FromVariable")
    assert "FromVariable" in run_cli("ls", env={"STITCHCACHE_DIR": str(tmp_path)}).out


def test_a_line_an_entry(run_cli, tmp_path):
    put(tmp_path, key("a"), "Decoder")
    heading, line = run_cli("ls", "--cache", tmp_path).out.splitlines()
    assert heading.split()[:3] == ["GRAPH", "LABEL", "CREATED"]
    cells = line.split()
    assert cells[:2] == [key("a")[:12], "Decoder"]
    assert "aoti" in cells
    assert cells[cells.index("aoti") + 1 :][:2] == ["3", "2"]
    assert "12.5 s" in line


def test_json_has_raw_values(run_cli, tmp_path):
    made = put(tmp_path, key("a"), "Decoder")
    (entry,) = run_cli("ls", "--json", "--cache", tmp_path).json["entries"]
    assert entry["graph_hash"] == key("a")
    assert entry["created"] == made.created
    assert entry["blob_bytes"] == sum(blob.size for blob in made.blobs)
    assert entry["entry_bytes"] == entry_file(tmp_path, key("a")).stat().st_size
    assert entry["last_used"] == entry_file(tmp_path, key("a")).stat().st_mtime
    assert [blob["digest"] for blob in entry["blobs"]] == [blob.digest for blob in made.blobs]
    assert (entry["pieces"], entry["variants"], entry["format_version"]) == (3, 1, 4)


def test_short_hashes_stay_different(run_cli, tmp_path):
    first, second = "ab" * 7 + "0" * 50, "ab" * 7 + "1" * 50
    put(tmp_path, first)
    put(tmp_path, second)
    shown = [line.split()[0] for line in run_cli("ls", "--cache", tmp_path).out.splitlines()[1:]]
    assert sorted(shown) == [first[:15], second[:15]]
    wide = [line.split()[0] for line in run_cli("ls", "--wide", "--cache", tmp_path).out.splitlines()[1:]]
    assert sorted(wide) == [first, second]


def test_orders(run_cli, tmp_path):
    put(tmp_path, key("a"), "Zebra", blobs=1)
    put(tmp_path, key("b"), "Ape", blobs=4)
    lines = run_cli("ls", "--sort", "label", "--cache", tmp_path).out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["Ape", "Zebra"]
    lines = run_cli("ls", "--sort", "size", "--cache", tmp_path).out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["Ape", "Zebra"]


def test_old_formats_are_listed(run_cli, tmp_path):
    for file in [*LEGACY.glob("*.pkl"), *LEGACY.glob("*.msgpack")]:
        shutil.copy(file, tmp_path)
    entries = run_cli("ls", "--json", "--cache", tmp_path).json["entries"]
    assert sorted(entry["format_version"] for entry in entries) == [0, 1, 1, 2, 2]
    assert "unknown" in run_cli("ls", "--cache", tmp_path).out


def test_a_damaged_entry_is_left_out_with_a_warning(run_cli, tmp_path):
    put(tmp_path, key("a"), "Good")
    put(tmp_path, key("b"), "Bad")
    file = entry_file(tmp_path, key("b"))
    file.write_bytes(file.read_bytes()[:80])
    outcome = run_cli("ls", "--cache", tmp_path)
    assert outcome.status == 0
    assert "Good" in outcome.out
    assert "Bad" not in outcome.out
    assert str(file) in outcome.err


def test_a_label_cannot_drive_the_terminal(run_cli, tmp_path):
    put(tmp_path, key("a"), "evil\x1b]0;title\x07\nrow")
    outcome = run_cli("ls", "--cache", tmp_path)
    assert "\x1b" not in outcome.out
    assert len(outcome.out.splitlines()) == 2
    assert "evil\\x1b]0;title\\x07\\nrow" in outcome.out


def test_a_terminal_gets_a_summary_and_its_width(run_on_terminal, tmp_path):
    put(tmp_path, key("a"), "A" * 200)
    put(tmp_path, key("b"), "B")
    wide = run_on_terminal("ls", "--cache", tmp_path)
    assert "2 entries, 4 blobs" in wide
    assert max(len(line) for line in _plain(wide).splitlines()) <= 100
    assert key("a")[:12] in wide


def test_a_pipe_gets_no_escapes(run_cli, tmp_path):
    put(tmp_path, key("a"))
    outcome = run_cli("ls", "--cache", tmp_path, env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert "\x1b" not in outcome.out


def _plain(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
