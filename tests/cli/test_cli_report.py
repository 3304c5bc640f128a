"""``stitchcache report``, and pages of ``diff`` and ``explain``."""

from __future__ import annotations

import os

from cli_entries import entry_file, key, put, put_target

from stitchcache.cache import Cache


def test_what_takes_space_is_shared_and_was_not_used(run_cli, tmp_path):
    put(tmp_path, key("a"), "Decoder")
    put(tmp_path, key("b"), "Decoder")
    put(tmp_path, key("c"), "Encoder", blobs=1)
    for name, used in (("a", 1_700_000_000 + 60), ("b", 1_700_000_000 + 7200), ("c", 1_700_000_000 + 60)):
        os.utime(entry_file(tmp_path, key(name)), (used, used))
    cache = Cache(tmp_path)
    counts = {"hit.direct": 6, "hit.graph": 1, "compiled": 3, "miss.new": 3, "microseconds.saved": 90_000_000}
    for name, number in counts.items():
        cache.count(name, number)
    # Counts are written when a cache goes away.
    del cache
    record = run_cli("report", "--cache", tmp_path, "--json").json
    assert record["hit_rate"] == 0.7
    assert record["saved_seconds"] == 90
    assert record["misses"] == {"new": 3}
    # Both decoders have the same two blobs.
    sizes = [len(b"blob 0 of Decoder") * 100, len(b"blob 1 of Decoder") * 100]
    assert record["shared"] == {"blobs": 2, "bytes": sum(sizes), "saved_bytes": sum(sizes)}
    used = {entry["graph_hash"]: entry["used"] for entry in record["entries"]}
    assert used == {key("a"): False, key("b"): True, key("c"): False}
    text = run_cli("report", "--cache", tmp_path).out
    assert "10: 6 direct, 1 by graph, 3 compiled, 70% hits" in text
    assert "1 min 30 s of compiling" in text
    assert text.count(key("a")[:12]) == 2  # among the largest, and among those without a use
    assert text.count(key("b")[:12]) == 1


def test_pages(run_cli, tmp_path):
    hostile = "<img src=x>\x1b[31m"
    put(tmp_path, key("a"), hostile)
    put(tmp_path, key("b"), "Other", blobs=1)
    put_target(tmp_path, "t", key("a"), {"env.torch": "2.13.0", "model.class": hostile}, label=hostile)
    place = tmp_path / "page.html"
    for words, shown in (
        (["report"], "Largest entries"),
        (["explain", key("a")[:8]], "Targets that lead here"),
        (["diff", key("a")[:8], key("b")[:8]], "only in B"),
    ):
        done = run_cli(*words, "--cache", tmp_path, "--html", place)
        assert done.out == ""
        assert str(place) in done.err
        text = place.read_text()
        assert shown in text
        assert "<img" not in text
        assert "\x1b" not in text
        assert "<script" not in text
    assert run_cli("report", "--cache", tmp_path, "--html", "-").out.startswith("<!doctype html>")
    assert run_cli("report", "--cache", tmp_path, "--html", tmp_path / "no" / "x.html").status == 1


def test_an_empty_cache(run_cli, tmp_path):
    assert "none counted" in run_cli("report", "--cache", tmp_path).out
    assert run_cli("report", "--cache", tmp_path / "missing").status == 2


def test_an_artifact_shows_itself_in_a_notebook(tmp_path):
    artifact = put(tmp_path, key("a"), "<b>Decoder</b>")
    text = artifact._repr_html_()
    assert key("a") in text
    assert "3 calls of 2 different" in text
    assert "&lt;b&gt;Decoder" in text
