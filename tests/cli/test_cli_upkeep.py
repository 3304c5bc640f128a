"""``stitchcache verify``, ``prune``, ``clear``, ``stats``, ``config`` and ``migrate``."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from cli_entries import entry_file, key, put, put_target

from stitchcache.cache import Cache

LEGACY = Path(__file__).parents[1] / "data" / "legacy"


@pytest.fixture
def root(tmp_path):
    put(tmp_path, key("a"), "Old")
    put(tmp_path, key("b"), "New")
    old = time.time() - 40 * 86400
    os.utime(entry_file(tmp_path, key("a")), (old, old))
    return tmp_path


def damage(root: Path, name: str) -> Path:
    file = entry_file(root, key(name))
    file.write_bytes(file.read_bytes()[:-1])
    return file


def test_verify_a_sound_cache(run_cli, root):
    outcome = run_cli("verify", "--cache", root)
    assert outcome.status == 0
    assert "2 entries, 4 blobs" in outcome.out
    assert "all sound" in outcome.out


def test_verify_finds_and_repairs(run_cli, root):
    file = damage(root, "b")
    outcome = run_cli("verify", "--cache", root)
    assert outcome.status == 1
    assert "damaged" in outcome.out
    assert outcome.out.count(str(file)) == 1  # the detail does not say it again
    assert file.exists()
    record = run_cli("verify", "--json", "--cache", root)
    assert record.status == 1
    assert record.json["clean"] is False
    assert record.json["findings"][0]["path"] == str(file)
    assert run_cli("verify", "--repair", "--cache", root).status == 0
    assert not file.exists()
    assert run_cli("verify", "--cache", root).status == 0


def test_prune_shows_first(run_cli, root):
    outcome = run_cli("prune", "--max-age", "30d", "--cache", root)
    assert outcome.status == 0
    assert key("a")[:12] in outcome.out
    assert "last used 40.0 days ago" in outcome.out
    assert "Nothing was removed" in outcome.out
    assert len(Cache(root).entries()) == 2


def test_prune_does_it(run_cli, root):
    outcome = run_cli("prune", "--max-age", "30d", "--yes", "--cache", root)
    assert outcome.status == 0
    assert "removed 1 entry" in outcome.out
    assert [header.label for header in Cache(root).entries()] == ["New"]


def test_prune_as_json(run_cli, root):
    record = run_cli("prune", "--max-age", "30d", "--json", "--cache", root).json
    assert [entry["graph_hash"] for entry in record["plan"]["entries"]] == [key("a")]
    assert record["done"] is None
    record = run_cli("prune", "--max-age", "30d", "--json", "--yes", "--cache", root).json
    assert record["done"]["entries"] == [key("a")]


def test_prune_without_limits_keeps_all(run_cli, root):
    outcome = run_cli("prune", "--yes", "--cache", root)
    assert outcome.status == 0
    assert len(Cache(root).entries()) == 2


@pytest.mark.parametrize(
    "options", [["--max-size", "3x"], ["--max-age", "soon"], ["--max-files", "-1"], ["--what"]]
)
def test_usage(run_cli, root, options):
    outcome = run_cli("prune", *options, "--cache", root)
    assert outcome.status == 2
    assert options[0] in outcome.err


def test_clear(run_cli, root):
    outcome = run_cli("clear", "--cache", root)
    assert "to remove: 2 entries, 4 blobs" in outcome.out
    assert len(Cache(root).entries()) == 2
    outcome = run_cli("clear", "--yes", "--cache", root)
    assert outcome.status == 0, outcome.err
    assert "removed 2 entries" in outcome.out
    assert run_cli("stats", "--json", "--cache", root).json["files"] == 0


def test_stats(run_cli, root):
    out = run_cli("stats", "--cache", root).out
    assert "entries  2" in out
    record = run_cli("stats", "--json", "--cache", root).json
    assert (record["entries"], record["blobs"]) == (2, 4)
    assert record["counters"]["put"] == 2
    assert "stitchcache_entries 2" in run_cli("stats", "--prometheus", "--cache", root).out
    assert run_cli("stats", "--prometheus", "--json", "--cache", root).status == 2


def test_config(run_cli, tmp_path):
    env = {"STITCHCACHE_DIR": str(tmp_path), "STITCHCACHE_MAX_SIZE": "2G", "STITCHCACHE_REQUIRE": "yes"}
    settings = run_cli("config", "--json", env=env).json["settings"]
    assert settings["root"] == {
        "value": str(tmp_path),
        "source": "environment",
        "variable": "STITCHCACHE_DIR",
    }
    assert settings["max_size"]["value"] == 2 << 30
    assert settings["require"]["value"] is True
    assert settings["audit"] == {"value": False, "source": "default", "variable": "STITCHCACHE_AUDIT"}
    assert settings["read_only"] == {"value": False, "source": "default", "variable": "STITCHCACHE_READONLY"}
    assert settings["check"]["value"] == "example"
    env |= {"STITCHCACHE_REQUIRE": "direct", "STITCHCACHE_CHECK": "none"}
    more = run_cli("config", "--json", env=env)
    found = [more.json["settings"][name]["value"] for name in ("require", "check")]
    assert found == ["direct", "none"]
    assert run_cli("config", "--json", "--cache", tmp_path).json["settings"]["root"]["source"] == "option"
    out = run_cli("config", env=env).out
    assert "2.0 GiB" in out


def test_config_shows_layers(run_cli, tmp_path):
    upper, lower = str(tmp_path / "upper"), str(tmp_path / "lower")
    settings = run_cli("config", "--json", env={"STITCHCACHE_DIR": f"{upper}:{lower}"}).json["settings"]
    assert (settings["root"]["value"], settings["lower_layers"]["value"]) == (upper, [lower])
    assert settings["lower_layers"]["source"] == "environment"
    assert lower in run_cli("config", "--cache", f"{upper}:{lower}").out
    empty = run_cli("config", env={"STITCHCACHE_DIR": f"{upper}:"})
    assert empty.status == 2
    assert "a layer has no name" in empty.err


@pytest.mark.parametrize(
    "command", [["ls"], ["verify"], ["prune"], ["clear", "--yes"], ["stats"], ["migrate"]], ids=lambda c: c[0]
)
def test_a_directory_that_is_missing_is_not_sound(run_cli, root, command):
    layers = f"{root}:{root / 'mount'}"
    outcome = run_cli(*command, "--cache", layers)
    assert (outcome.status, outcome.out) == (2, "")
    assert f"{root / 'mount'}: there is no such directory" in outcome.err
    assert run_cli(*command, "--allow-missing", "--cache", layers).status == 0


def test_rm(run_cli, root):
    leading = put_target(root, "leading", key("b"), {})
    pointless = run_cli("rm", key("b")[:8], "0123", "--cache", root)
    assert pointless.status == 1
    assert entry_file(root, key("b")).exists()
    shared = Cache(root).put_blob(b"blob 0 of New" * 100)
    outcome = run_cli("rm", key("b")[:8], "--cache", root)
    assert outcome.status == 0
    # An entry, its target, and its two blobs, of which nothing else has one.
    assert "removed 1 entry, 4 files" in outcome.out
    assert not entry_file(root, key("b")).exists()
    assert not (root / "targets" / leading[:2] / leading).exists()
    assert not (root / "blobs" / shared.digest[:2] / shared.digest).exists()
    assert run_cli("verify", "--cache", root).status == 0
    assert entry_file(root, key("a")).exists()


def test_rm_leaves_what_other_entries_need(run_cli, tmp_path):
    put(tmp_path, key("a"), "Same")
    kept = put(tmp_path, key("b"), "Same")
    record = run_cli("rm", key("a"), "--json", "--cache", tmp_path).json["done"]
    assert (record["entries"], record["files"]) == ([key("a")], 1)
    assert all(Cache(tmp_path).blob_path(blob) for blob in kept.blobs)


def test_rm_of_a_lower_layer_or_a_read_only_one(run_cli, root, tmp_path_factory):
    upper = tmp_path_factory.mktemp("upper")
    outcome = run_cli("rm", key("a"), "--cache", f"{upper}:{root}")
    assert outcome.status == 1
    assert "in a lower layer" in outcome.err
    outcome = run_cli("rm", key("a"), "--cache", root, env={"STITCHCACHE_READONLY": "1"})
    assert outcome.status == 1
    assert "opened read-only" in outcome.err
    assert "cannot be listed" not in outcome.err
    assert entry_file(root, key("a")).exists()


def test_a_setting_that_makes_no_sense(run_cli):
    outcome = run_cli("config", env={"STITCHCACHE_MAX_SIZE": "lots"})
    assert outcome.status == 2
    assert "STITCHCACHE_MAX_SIZE='lots'" in outcome.err


def test_a_cache_that_is_a_file(run_cli, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = run_cli("ls", "--cache", tmp_path / "file")
    assert outcome.status == 1
    assert "is not a directory" in outcome.err


def test_migrate(run_cli, tmp_path):
    for file in [*LEGACY.glob("*.pkl"), *LEGACY.glob("*.msgpack")]:
        shutil.copy(file, tmp_path)
    done = run_cli("migrate", "--json", "--cache", tmp_path).json["migrated"]
    assert len(done) == 5
    assert {header.format_version for header in Cache(tmp_path).entries()} == {4}
    assert run_cli("migrate", "--cache", tmp_path).out == ""
