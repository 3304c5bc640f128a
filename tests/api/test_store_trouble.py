"""A cache that is damaged, unwritable or full costs time, never a result."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import models
import pytest
import torch

import stitchcache
from stitchcache import errors


def compile_decoder(cache):
    return stitchcache.compile(models.decoder(), (models.ids(),), cache=cache, **models.decoder_options())


def check(compiled):
    torch.testing.assert_close(compiled(models.ids(3, 4)), models.decoder()(models.ids(3, 4)))


def files(root, area):
    return sorted(path for path in (root / area).rglob("*") if path.is_file())


@pytest.mark.parametrize("area", ["entries", "blobs", "targets", "pieces"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damage_is_a_miss_with_one_warning_and_is_rebuilt(tmp_path, area, damage, caplog):
    compile_decoder(stitchcache.Cache(tmp_path))
    for path in files(tmp_path, area):
        data = path.read_bytes()
        middle = len(data) // 2
        changed = {
            "truncate": data[:middle],
            "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "empty": b"",
        }[damage]
        path.chmod(0o600)
        path.write_bytes(changed)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="stitchcache"):
        compiled = compile_decoder(stitchcache.Cache(tmp_path))
    check(compiled)
    if area != "pieces":
        assert compiled.cache_hit != "direct"
        warned = [record.message for record in caplog.records if record.name == "stitchcache"]
        assert warned
        assert all(str(tmp_path) in line for line in warned)
    again = compile_decoder(stitchcache.Cache(tmp_path))
    assert again.cache_hit == "direct"
    check(again)


def test_a_forbidden_miss_says_what_is_wrong_with_the_cache(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    compile_decoder(stitchcache.Cache(root))
    root.chmod(0o777)
    for require in ("1", "direct"):
        monkeypatch.setenv("STITCHCACHE_REQUIRE", require)
        with pytest.raises(errors.CacheMissError) as caught:
            compile_decoder(stitchcache.Cache(root))
        assert f"{root} has mode 0777" in caught.value.reason
        assert f"chmod go-w '{root}'" in str(caught.value)
        assert "prewarm' where" not in str(caught.value)
    root.chmod(0o755)
    assert compile_decoder(stitchcache.Cache(root)).cache_hit == "direct"


def test_a_root_that_is_not_trusted_is_warned_of_once(tmp_path, caplog):
    """Not for each file that was looked for in it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with caplog.at_level(logging.WARNING, logger="stitchcache"):
        check(compile_decoder(stitchcache.Cache(tmp_path / "cache")))
    said = [each.message for each in caplog.records if "has mode 0777" in each.message]
    assert len([line for line in said if "stored" not in line]) == 1, said


def test_a_forbidden_miss_says_what_is_wrong_with_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("STITCHCACHE_REQUIRE", "1")
    for area, said in (("targets", "damaged"), ("entries", "damaged"), ("blobs", "not there")):
        root = tmp_path / area
        monkeypatch.delenv("STITCHCACHE_REQUIRE")
        compile_decoder(stitchcache.Cache(root))
        monkeypatch.setenv("STITCHCACHE_REQUIRE", "1")
        for path in files(root, area):
            path.write_bytes(path.read_bytes()[:-1])
        if area == "targets":
            # Found by its graph all the same.
            assert said in compile_decoder(stitchcache.Cache(root)).explain().reason
            continue
        with pytest.raises(errors.CacheMissError) as caught:
            compile_decoder(stitchcache.Cache(root))
        assert said in caught.value.reason, area


def test_a_lower_layer_that_is_not_trusted_stops_nothing(tmp_path, monkeypatch):
    """As one that somebody else owns: it is passed over, and the upper layer fills up."""
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    compile_decoder(stitchcache.Cache(lower))
    monkeypatch.setenv("STITCHCACHE_DIR", f"{upper}:{lower}")
    assert compile_decoder(stitchcache.Cache()).cache_hit == "direct"
    lower.chmod(0o777)
    compiled = compile_decoder(stitchcache.Cache())
    assert compiled.cache_hit is None
    assert "has mode 0777" in compiled.explain().reason
    check(compiled)
    assert compile_decoder(stitchcache.Cache()).cache_hit == "direct"
    assert stitchcache.Cache().find(compiled.graph_hash[:12]) == compiled.graph_hash


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StoreError, match="file"):
        stitchcache.Cache(tmp_path / "file")


def test_a_read_only_root_still_serves_and_still_compiles(tmp_path, caplog):
    root = tmp_path / "cache"
    compile_decoder(stitchcache.Cache(root))
    read_only = stitchcache.Cache(root, read_only=True)
    assert compile_decoder(read_only).cache_hit == "direct"
    empty = stitchcache.Cache(tmp_path / "nothing", read_only=True)
    with caplog.at_level(logging.WARNING, logger="stitchcache"):
        compiled = compile_decoder(empty)
    check(compiled)
    assert compiled.cache_hit is None
    assert any("not stored" in record.message for record in caplog.records)
    assert not (tmp_path / "nothing").exists()


def test_a_full_disk_costs_storing_only(tmp_path):
    """A file system of a few pages, in a mount namespace of its own."""
    script = f"""
import sys
sys.path[:0] = {[os.path.dirname(models.__file__), os.path.dirname(os.path.dirname(models.__file__))]!r}
import torch, models, stitchcache
cache = stitchcache.Cache({str(tmp_path / "full")!r})
compiled = stitchcache.compile(models.decoder(), (models.ids(),), cache=cache, **models.decoder_options())
torch.testing.assert_close(compiled(models.ids(3, 4)), models.decoder()(models.ids(3, 4)))
print("RESULT", compiled.cache_hit)
"""
    (tmp_path / "full").mkdir()
    place = tmp_path / "full"
    mount = f'mount -t tmpfs -o size=16k,nr_inodes=24 none {place} && exec {sys.executable} -c "$SCRIPT"'
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount],
        env={**os.environ, "SCRIPT": script},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()[:100]}")
    assert "RESULT None" in done.stdout, done.stderr[-2000:]
    assert "not stored" in done.stderr


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cache = stitchcache.Cache(tmp_path / "cache")
    with pytest.raises(errors.CompilerMissingError, match=r"apt install g\+\+.*backend='eager'"):
        stitchcache.compile(torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),), cache=cache)
    assert stitchcache.compile(
        torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),), cache=cache, backend="eager"
    )
