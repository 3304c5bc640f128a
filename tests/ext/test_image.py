"""Images of entries: reproducible, laid out as GKM and KServe take them, and hit from after a registry."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))
sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))

from cli_environment import environment
from mcv import RELEASED, blob, extract, manifest_of
from registry_server import serving
from stores import artifact, files_under, key, put, read_back, target

import stitchcache
from stitchcache.artifact.entry import OUTSIDE
from stitchcache.cache import Cache
from stitchcache.errors import OptionError, StoreError, StoreWriteError, UntrustedEntryError
from stitchcache.ext.image import build_image, push_image
from stitchcache.types import Factor

TARGET = """
import torch
import stitchcache

def build():
    return torch.nn.Linear(4, 4).eval(), (torch.zeros(2, 4),)

target = stitchcache.Target("linear", build, backend="eager")
"""


def factor(name: str, value: str) -> Factor:
    return Factor(name=name, value=value, digest=key(value))


def put_for(cache: Cache, name: str, *factors: Factor, created: float = 1.5) -> None:
    made = artifact(name, [cache.put_blob(name.encode() * 100)], created=created)
    cache.put(replace(made, factors=factors))


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "built")
    put(cache, "a", [b"one" * 200, b"shared"], label="ranker", created=1_700_000_000.5)
    put(cache, "b", [b"shared", b""], label="encoder", created=1_600_000_000.0)
    cache.put_target(key("t"), target(key("a")))
    return cache


@pytest.fixture(scope="module")
def prewarmed(tmp_path_factory):
    """A cache with a target that a start hits directly."""
    folder = tmp_path_factory.mktemp("prewarmed")
    (folder / "targets.py").write_text(TARGET)
    assert run("prewarm", "targets.py:target", cwd=folder, STITCHCACHE_DIR=folder / "cache").returncode == 0
    return folder


def run(*words: object, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess[str]:
    settings = {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-m", "stitchcache", *map(str, words)]
    return subprocess.run(
        command, env=environment(**settings), cwd=cwd, capture_output=True, text=True, check=False
    )


def contents(image: Path) -> dict[str, bytes]:
    return {str(path.relative_to(image)): path.read_bytes() for path in image.rglob("*") if path.is_file()}


# -- what is made ----------------------------------------------------------------------------------


def test_the_layout_is_ocis_and_every_digest_is_right(cache, tmp_path):
    made = build_image(cache, tmp_path / "image")
    files = contents(tmp_path / "image")
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    for name, data in files.items():
        if name.startswith("blobs/"):
            assert hashlib.sha256(data).hexdigest() == name.rpartition("/")[2]
    (described,) = json.loads(files["index.json"])["manifests"]
    assert described["digest"] == made.digest
    manifest = manifest_of(tmp_path / "image")
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    for part in (manifest["config"], layer):
        assert blob(tmp_path / "image", part["digest"]).stat().st_size == part["size"]
    config = json.loads(blob(tmp_path / "image", manifest["config"]["digest"]).read_bytes())
    assert (config["os"], config["created"]) == ("linux", "2023-11-14T22:13:20Z")
    assert config["config"]["Labels"] == made.labels


def test_labels_are_those_that_gkm_and_kserve_read(cache, tmp_path):
    labels = build_image(cache, tmp_path / "image").labels
    summary = json.loads(labels.pop("cache.stitchcache.image/summary"))
    assert summary == {"targets": [{"backend": "cpu", "arch": summary["targets"][0]["arch"], "warp_size": 1}]}
    assert extract(tmp_path / "image", tmp_path / "out", tmp_path / "listed") == "stitchcache"
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert labels == {
        "cache.stitchcache.image/entry-count": "2",
        "cache.stitchcache.image/cache-size-bytes": str(size),
        "io.kserve.km/cache-hash": key("".join(sorted([key("a"), key("b")]))),
        "io.kserve.km/cache-type": "stitchcache",
        "io.kserve.km/cache-root-env": "STITCHCACHE_DIR=/home/kserve/.cache/stitchcache",
        "io.kserve.km/cache-mount-subpath": ".",
        "io.kserve.km/framework": "pytorch",
    }
    listed = json.loads((tmp_path / "listed" / "manifest.json").read_text())["stitchcache"]
    assert {each["label"]: each["factors"] for each in listed} == {
        "ranker": {"env.torch": "2.13"},
        "encoder": {"env.torch": "2.13"},
    }


def test_the_same_entries_are_the_same_bytes_from_anywhere(cache, tmp_path):
    first = build_image(cache, tmp_path / "first")
    moved = shutil.copytree(cache.root, tmp_path / "elsewhere" / "moved")
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    os.umask(0o077)
    second = build_image(Cache(moved), tmp_path / "deep" / "second")
    assert first == second
    assert contents(tmp_path / "first") == contents(tmp_path / "deep" / "second")


def test_what_is_extracted_is_a_layer_that_others_can_read(cache, tmp_path):
    build_image(cache, tmp_path / "image")
    extract(tmp_path / "image", tmp_path / "out", tmp_path / "listed")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o644}
    layered = Cache([tmp_path / "upper", tmp_path / "out"])
    assert read_back(layered, key("a")) == [b"one" * 200, b"shared"]
    assert [record.graph_hash for record in layered.get_target(key("t"))] == [key("a")]
    assert Cache(tmp_path / "out").verify().clean
    # Not of 1970: a prune by age must not take all of what an init container copied.
    assert {int(path.stat().st_mtime) > 1_000_000_000 for path in (tmp_path / "out").rglob("*")} == {True}


def test_entries_are_chosen_as_for_a_bundle(cache, tmp_path):
    assert build_image(cache, tmp_path / "one", label="rank*").entries == (key("a"),)
    assert build_image(cache, tmp_path / "two", [key("b")]).entries == (key("b"),)
    assert build_image(cache, tmp_path / "three", target=key("t")[:8]).entries == (key("a"),)
    with pytest.raises(StoreError, match="no entry is asked for"):
        build_image(cache, tmp_path / "four", max_age=60.0)
    assert not (tmp_path / "four").exists()


def test_an_extractor_that_knows_only_vllm_takes_its_layout(cache, tmp_path):
    build_image(cache, tmp_path / "ours")
    with pytest.raises(ValueError, match="unknown cache type"):
        extract(tmp_path / "ours", tmp_path / "no", tmp_path / "no", RELEASED)
    build_image(cache, tmp_path / "theirs", layout="vllm")
    assert extract(tmp_path / "theirs", tmp_path / "out", tmp_path / "listed", RELEASED) == "vllm"
    assert read_back(Cache(tmp_path / "out"), key("b")) == [b"shared", b""]
    assert json.loads((tmp_path / "listed" / "manifest.json").read_text()) == {"vllm": []}


@pytest.mark.parametrize(
    ("gpu", "arch", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", None, ("cuda", "sm_90", 32)),
        ("NVIDIA A100-SXM4-80GB", None, ("cuda", "sm_80", 32)),
        ("Tesla T4", None, ("cuda", "sm_75", 32)),
        ("NVIDIA Next 1", "sm_130", ("cuda", "sm_130", 32)),
        ("gfx90a:sramecc+:xnack-", None, ("hip", "gfx90a", 64)),
        ("gfx1100", None, ("hip", "gfx1100", 32)),
    ],
)
def test_hardware_is_told_as_gkm_compares_it(tmp_path, gpu, arch, expected):
    cache = Cache(tmp_path / "cache")
    put_for(cache, "a", factor("env.gpu", gpu), factor("env.platform", "linux aarch64 little"))
    labels = build_image(cache, tmp_path / "image", arch=arch).labels
    (told,) = json.loads(labels["cache.stitchcache.image/summary"])["targets"]
    assert (told["backend"], told["arch"], told["warp_size"]) == expected
    manifest = manifest_of(tmp_path / "image")
    config = json.loads(blob(tmp_path / "image", manifest["config"]["digest"]).read_bytes())
    assert config["architecture"] == "arm64"


def test_what_cannot_be_an_image_is_refused(cache, tmp_path):
    (tmp_path / "there").mkdir()
    for how, said in (
        ({"path": tmp_path / "there"}, "exists: remove it"),
        ({"layout": "triton"}, "there is stitchcache, vllm"),
    ):
        with pytest.raises(OptionError, match=said):
            build_image(cache, **{"path": tmp_path / "image", **how})
    put_for(cache, "gpu", factor("env.gpu", "NVIDIA Next 1"))
    with pytest.raises(OptionError, match="such as 'sm_90'"):
        build_image(cache, tmp_path / "image")
    put_for(cache, "x86", factor("env.platform", "linux x86_64 little"))
    put_for(cache, "arm", factor("env.platform", "linux aarch64 little"))
    with pytest.raises(OptionError, match="2 platforms"):
        build_image(cache, tmp_path / "image")
    made = build_image(cache, tmp_path / "image", [key("a")])
    assert made.entries == (key("a"),)


def test_a_damaged_blob_ends_the_making_and_leaves_nothing(cache, tmp_path):
    for path in files_under(cache.root / "blobs"):
        (cache.root / "blobs" / path).write_bytes(b"junk")
    with pytest.raises(StoreError, match="missing"):
        build_image(cache, tmp_path / "image")
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


def test_with_a_key_it_is_signed_and_a_stranger_can_own_it(cache, tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    from signing import new_keys, open_to_others, public

    from stitchcache.ext.sign import Keys

    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "ci"))
    keys = new_keys(tmp_path / "ci")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(time.time())))
    first, second = (build_image(Cache(cache.root), tmp_path / name) for name in ("one", "two"))
    assert first == second
    extract(tmp_path / "one", tmp_path / "out", tmp_path / "listed")
    open_to_others(tmp_path / "out")
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "serving"))
    with pytest.raises(UntrustedEntryError):
        Cache(tmp_path / "out", trust="signed").get(key("a"))
    Keys().trust(public(keys), "ci@example.com", {})
    served = Cache([tmp_path / "upper", tmp_path / "out"], trust=["owner", "signed"])
    assert read_back(served, key("a")) == [b"one" * 200, b"shared"]
    assert [record.graph_hash for record in served.get_target(key("t"))] == [key("a")]


def test_an_imported_entry_that_nobody_vouches_for_is_left_out(cache, tmp_path):
    pytest.importorskip("cryptography")
    found = cache.get(key("a"))
    cache.put(found, signature=OUTSIDE + b"of somebody")
    assert build_image(Cache(cache.root), tmp_path / "image").entries == (key("b"),)


# -- from a registry to a hit ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Debian's docker-registry on a free port; its address."""
    with serving(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo: apt-get install skopeo")
def test_pushed_pulled_extracted_and_hit(prewarmed, registry, tmp_path):
    built = run("image", "build", tmp_path / "image", "--json", STITCHCACHE_DIR=prewarmed / "cache")
    made = json.loads(built.stdout)
    reference = f"{registry}/team/linear-cache:1"
    pushed = run("image", "push", tmp_path / "image", reference, "--insecure")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{registry}/team/linear-cache@{made['digest']}"
    seen = skopeo("inspect", "--tls-verify=false", f"docker://{reference}")
    inspected = json.loads(seen)
    assert (inspected["Digest"], inspected["Labels"]) == (made["digest"], made["labels"])
    assert len(inspected["Layers"]) == 1
    skopeo(
        "copy", "--src-tls-verify=false", f"docker://{pushed.stdout.strip()}", f"dir:{tmp_path / 'pulled'}"
    )
    assert extract(tmp_path / "pulled", tmp_path / "out", tmp_path / "listed") == "stitchcache"
    # As the manifest of docs/howto-fleet.md mounts it, and nothing may be traced.
    layers = f"{tmp_path / 'upper'}:{tmp_path / 'out'}"
    start = run(
        "prewarm", "targets.py:target", cwd=prewarmed, STITCHCACHE_DIR=layers, STITCHCACHE_REQUIRE="direct"
    )
    assert (start.returncode, "hit direct" in start.stdout) == (0, True), start.stderr


def skopeo(*words: str) -> str:
    return subprocess.run(["skopeo", *words], capture_output=True, text=True, check=True).stdout


def test_a_registry_that_refuses_is_quoted(cache, tmp_path, registry):
    build_image(cache, tmp_path / "image")
    with pytest.raises(StoreWriteError, match=r"was not pushed: .*SSL.*'docker login'"):
        # It has no TLS.
        push_image(tmp_path / "image", f"{registry}/team/x:1")
    with pytest.raises(StoreWriteError, match=r"was not pushed: .*No such file"):
        push_image(tmp_path / "nothing", f"{registry}/team/x:1", insecure=True)
    with pytest.raises(StoreWriteError, match=r"was not pushed: .*small letters"):
        push_image(tmp_path / "image", f"{registry}/Team/X:1", insecure=True)
    pushed = [push_image(tmp_path / "image", f"{registry}/team/x{tag}", insecure=True) for tag in ("", ":2")]
    assert pushed[0] == pushed[1], "what is there is not sent again"


def test_making_one_imports_no_torch(prewarmed, tmp_path):
    done = run(
        "image", "build", tmp_path / "image", STITCHCACHE_DIR=prewarmed / "cache", PYTHONPROFILEIMPORTTIME="1"
    )
    assert done.returncode == 0, done.stderr
    assert " torch\n" not in done.stderr
    assert stitchcache.__version__
