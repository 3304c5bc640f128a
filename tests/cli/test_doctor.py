"""``stitchcache doctor``, in good places and on file systems that lack something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])}


def findings(outcome) -> dict[str, dict[str, str]]:
    return {each["name"]: each for each in outcome.json["findings"]}


def test_a_good_place(run_cli, tmp_path):
    outcome = run_cli("doctor", "--json", tmp_path)
    found = findings(outcome)
    assert outcome.json["root"] == str(tmp_path)
    for name in ("directory", "trust", "write", "lock", "exec", "torch"):
        assert found[name]["level"] == "ok", found[name]
    assert {"space", "python", "compiler"} <= found.keys()
    assert " keys trusted in " in found["signatures"]["found"]
    levels = [each["level"] for each in outcome.json["findings"]]
    assert outcome.json["problems"] == levels.count("problem")
    assert outcome.status == (1 if "problem" in levels else 0)
    assert not list(tmp_path.iterdir())


def test_the_default_place_that_is_not_made_yet(run_cli, tmp_path):
    outcome = run_cli("doctor", env={"STITCHCACHE_DIR": str(tmp_path / "not" / "yet")})
    assert str(tmp_path / "not" / "yet") in outcome.out
    assert "missing; tried" in outcome.out
    assert not list(tmp_path.iterdir())


def test_what_a_directory_is_made_in_is_not_taken_for_a_cache(run_cli):
    """Or the advice would be to take everyone's right to write /tmp away."""
    for missing in ("/nonexistent/cache", "/tmp/nonexistent/cache"):
        found = findings(run_cli("doctor", "--json", missing))["trust"]
        assert (found["level"], "chmod" in found["found"]) == ("ok", False), found


def test_a_file_where_the_cache_should_be(run_cli, tmp_path):
    (tmp_path / "file").touch()
    outcome = run_cli("doctor", tmp_path / "file")
    assert outcome.status == 1
    assert "is not a directory" in outcome.out
    assert "STITCHCACHE_DIR" in outcome.out


@pytest.mark.parametrize("part", ["", "blobs"])
def test_a_directory_that_others_can_write(run_cli, tmp_path, part):
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    for path in (tmp_path / "cache", tmp_path / "cache" / "blobs"):
        path.chmod(0o755)
    (tmp_path / "cache" / part).chmod(0o777)
    outcome = run_cli("doctor", "--json", tmp_path / "cache")
    assert outcome.status == 1
    assert findings(outcome)["trust"]["level"] == "problem"
    assert "chmod go-w" in findings(outcome)["trust"]["found"]


def test_lower_layers(run_cli, tmp_path):
    lower = tmp_path / "lower"
    good = (lower.mkdir(mode=0o755), run_cli("doctor", "--json", f"{tmp_path}:{lower}"))[1]
    assert findings(good)["lower layer"]["level"] == "ok"
    lower.chmod(0o777)
    shared = run_cli("doctor", "--json", env={"STITCHCACHE_DIR": f"{tmp_path}:{lower}"})
    assert "chmod go-w" in findings(shared)["lower layer"]["found"]
    missing = run_cli("doctor", "--json", f"{tmp_path}:{tmp_path / 'mount'}")
    assert missing.status == 1
    assert "is it mounted?" in findings(missing)["lower layer"]["meaning"]


def test_settings_in_force(run_cli, tmp_path):
    bad = run_cli("doctor", tmp_path, env={"STITCHCACHE_MAX_SIZE": "lots", "STITCHCACHE_MAXSIZE": "1G"})
    assert bad.status == 1
    assert "problem  environment  STITCHCACHE_MAX_SIZE=lots" in bad.out
    assert "note     environment  STITCHCACHE_MAXSIZE=1G" in bad.out
    good = run_cli("doctor", "--json", tmp_path, env={"STITCHCACHE_REQUIRE": "1", "STITCHCACHE_AUDIT": "1"})
    said = {each["found"]: each for each in good.json["findings"] if each["name"] == "environment"}
    assert said["STITCHCACHE_AUDIT=1"]["level"] == said["STITCHCACHE_REQUIRE=1"]["level"] == "ok"


def test_no_compiler_is_a_note(run_cli, tmp_path):
    outcome = run_cli("doctor", "--json", tmp_path, env={"CXX": "no-such-compiler"})
    compiler = findings(outcome)["compiler"]
    assert compiler["level"] == "note"
    assert "no-such-compiler" in compiler["found"]


def test_it_finds_the_compiler_that_compiling_finds(run_cli, tmp_path):
    from stitchcache.pieces import find_compiler

    found = findings(run_cli("doctor", "--json", tmp_path))["compiler"]
    assert (found["found"] if found["level"] == "ok" else None) == find_compiler()


def test_two_names_for_one_place(run_cli, tmp_path):
    assert run_cli("doctor", tmp_path, "--cache", tmp_path).status == 2


def test_it_imports_no_torch(tmp_path):
    source = (
        "import sys\nfrom stitchcache.cli import main\ntry:\n    main()\n"
        "finally:\n    print([n for n in ('torch', 'numpy', 'rich') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, "doctor", str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("options", "name", "level", "meaning"),
    [
        ("noexec", "exec", "note", "noexec"),
        ("ro", "write", "problem", "nothing can be stored here"),
        ("size=1m", "space", "problem", "free space"),
        ("nr_inodes=50", "space", "problem", "remove small files"),
    ],
)
def test_on_a_file_system_that_lacks_something(tmp_path, options, name, level, meaning):
    place = tmp_path / "place"
    place.mkdir()
    mount = f'mount -t tmpfs -o mode=0755,{options} none {place} && exec "$0" -m stitchcache doctor'
    mount = f"{mount} --json {place}"
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, sys.executable],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stderr.startswith(("unshare:", "mount:")) or "permission denied" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()[:100]}")
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert found[name]["level"] == level
    assert meaning in found[name]["meaning"]
    assert done.returncode == (level == "problem")
    assert not os.listdir(place)
