"""``stitchcache push``, ``pull``, ``stats --remote``, and what ``config`` and ``doctor`` say of a remote."""

from __future__ import annotations

import os
import time

import pytest
from cli_entries import put, put_target

pytest.importorskip("obstore")
pytest.importorskip("cryptography")

A, B = "a1" * 32, "b2" * 32


@pytest.fixture
def home(run_cli, tmp_path):
    """A cache with two entries and a key, and a remote that is empty."""
    root = tmp_path / "cache"
    put(root, A, label="ranker")
    put(root, B, label="encoder")
    put_target(root, "t", A, {"env.torch": "2.13"})
    env = {
        "STITCHCACHE_KEYS": str(tmp_path / "keys"),
        "STITCHCACHE_DIR": str(root),
        "STITCHCACHE_REMOTE": f"file://{tmp_path}/remote",
    }
    assert run_cli("keys", "generate", "ci@example.com", env=env).status == 0
    return env


def test_push_and_pull_move_what_is_asked_for_and_only_once(run_cli, home, tmp_path):
    first = run_cli("push", "--label", "rank*", "--json", env=home)
    assert first.status == 0, first.err
    assert first.json["entries"] == {A: "sent"}
    second = run_cli("push", env=home)
    assert (second.status, second.out.split()) == (0, [A, "there", "already", B, "sent"]), second.err
    assert "2 of 2" in second.err
    held = {each["area"]: each for each in run_cli("stats", "--remote", "--json", env=home).json["areas"]}
    assert held["entries"]["objects"] == 2
    assert "entries" in run_cli("stats", "--remote", env=home).out
    elsewhere = {**home, "STITCHCACHE_DIR": str(tmp_path / "other")}
    pulled = run_cli("pull", "--target", "", "--label", "ranker", "--json", env=elsewhere)
    assert (pulled.status, pulled.json["entries"]) == (0, {A: "fetched"}), pulled.err
    assert list((tmp_path / "other" / "targets").rglob("*"))
    rest = run_cli("pull", "--json", env=elsewhere)
    assert (rest.status, rest.json["entries"]) == (0, {A: "there already", B: "fetched"}), rest.err
    assert run_cli("verify", env=elsewhere).status == 0


def test_prune_of_the_remote_says_what_goes_and_does_it(run_cli, home, tmp_path):
    assert run_cli("push", env=home).status == 0
    for path in (tmp_path / "remote").rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 200_000, time.time() - 200_000))
    nowhere = {**home, "STITCHCACHE_DIR": str(tmp_path / "nowhere")}
    assert "entries" in run_cli("stats", "--remote", env=nowhere).out
    look = run_cli("prune", "--remote", "--max-size", "0", env=nowhere)
    assert (look.status, "Nothing was removed" in look.out, A[:8] in look.out) == (0, True, True), look.err
    assert len(run_cli("pull", "--json", env=home).json["entries"]) == 2
    done = run_cli("prune", "--remote", "--max-age", "1d", "--yes", "--json", env=home)
    assert (done.status, done.json["root"]) == (0, home["STITCHCACHE_REMOTE"]), done.err
    assert sorted(done.json["done"]["entries"]) == [A, B]
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert run_cli("push", env=home).status == 0, "what the cache holds can be uploaded again"


def test_what_a_stranger_put_there_is_not_pulled(run_cli, home, tmp_path):
    assert run_cli("push", env=home).status == 0
    elsewhere = {"STITCHCACHE_DIR": str(tmp_path / "other"), "STITCHCACHE_KEYS": str(tmp_path / "none")}
    pulled = run_cli("pull", "--remote", home["STITCHCACHE_REMOTE"], env=elsewhere)
    assert pulled.status == 1
    assert "no line of" in pulled.err
    assert not (tmp_path / "other" / "entries").exists()


def test_config_and_doctor_tell_of_the_remote(run_cli, home):
    settings = run_cli("config", "--json", env=home).json["settings"]
    assert settings["remote"]["value"] == home["STITCHCACHE_REMOTE"]
    assert settings["remote_wait"]["value"] == 1.0
    (found,) = [
        each for each in run_cli("doctor", "--json", env=home).json["findings"] if each["name"] == "remote"
    ]
    assert found["level"] == "ok", found
    gone = run_cli("doctor", "--json", env={**home, "STITCHCACHE_REMOTE": "file:///proc/nowhere"})
    (found,) = [each for each in gone.json["findings"] if each["name"] == "remote"]
    assert (gone.status, found["level"]) == (1, "problem")


@pytest.mark.parametrize("command", ["push", "pull", "stats", "prune"])
def test_without_a_remote_commands_say_how_to_name_one(run_cli, home, command):
    env = {**home, "STITCHCACHE_REMOTE": ""}
    done = run_cli(command, *(["--remote"] if command in ("stats", "prune") else []), env=env)
    assert done.status == 2
    assert "STITCHCACHE_REMOTE" in done.err


def test_a_registry_needs_no_lease_and_keeps_its_own_rules(run_cli, home):
    env = {**home, "STITCHCACHE_REMOTE": "oci://127.0.0.1:9/cache", "OCI_ALLOW_HTTP": "true"}
    findings = run_cli("doctor", "--json", env=env).json["findings"]
    (found,) = [each for each in findings if each["name"] == "remote"]
    assert (found["level"], "refused" in found["meaning"]) == ("problem", True), found
    done = run_cli("prune", "--remote", env=env)
    assert (done.status, "its own rules" in done.err) == (2, True)
    assert run_cli("push", "--remote", "http://x", env=home).status == 2
