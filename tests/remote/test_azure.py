"""A real Azure Blob server: Azurite, from its npm package (``npm install azurite``), on PATH."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import time
from email.utils import formatdate

import pytest
from stores import key, put, target
from test_fleet import end, share
from test_prune import pruned
from test_tier import fetched

from stitchcache.remote import Remote

AZURITE = shutil.which("azurite-blob")
# Of the emulator's only account; everybody has it.
ACCOUNT = "devstoreaccount1"
SECRET = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

pytestmark = pytest.mark.skipif(AZURITE is None, reason="needs Azurite: npm install azurite")


@pytest.fixture
def azure(tmp_path, monkeypatch):
    """A container's URL."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
    command = [AZURITE, "--blobPort", str(port), "--location", str(tmp_path / "azurite"), "--silent"]
    with subprocess.Popen([*command, "--skipApiVersionCheck", "--disableTelemetry"]) as server:
        try:
            make_container(port)
            for name, value in {
                "AZURE_STORAGE_USE_EMULATOR": "true",
                "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
                "AZURE_ALLOW_HTTP": "true",
            }.items():
                monkeypatch.setenv(name, value)
            yield "az://container/cache"
        finally:
            server.kill()


def make_container(port: int) -> None:
    now, version = formatdate(usegmt=True), "2021-08-06"
    headers = {"x-ms-date": now, "x-ms-version": version}
    lines = ["PUT", *[""] * 11, f"x-ms-date:{now}", f"x-ms-version:{version}"]
    signed = "\n".join([*lines, f"/{ACCOUNT}/{ACCOUNT}/container", "restype:container"])
    digest = hmac.digest(base64.b64decode(SECRET), signed.encode(), hashlib.sha256)
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"}
    for _ in range(200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("PUT", f"/{ACCOUNT}/container?restype=container", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 201, answer.read()
            return
        except ConnectionError:
            time.sleep(0.1)
    pytest.fail("Azurite takes longer than 20 s to start")


def test_it_does_what_a_tier_needs(azure, node, keys, tmp_path, monkeypatch):
    """In one start of the server: an object created once, nodes that share, a killed holder, a prune."""
    remote = Remote(f"{azure}/once", lambda *_: None)
    assert remote.now(remote.write, "a", b"1")
    assert not remote.now(remote.write, "a", b"2")
    assert remote.now(remote.read, "a", 9) == b"1"
    builder, other = node(azure), node(azure)
    put(builder, "a", [os.urandom(3 << 20), b"2"])
    builder.put_target(key("t"), target(key("a")))
    assert fetched(other) is not None
    assert other.tier.remote.requests == 2 + 2
    assert share(tmp_path, f"{azure}/killed", "first", kill_at=12).wait(60) == -9
    ((second, err),) = end([share(tmp_path, f"{azure}/killed", "second")])
    assert second["seconds"] < 4, err
    assert pruned(builder, max_bytes=0).files == 0, "all of it is young"
    monkeypatch.setattr("stitchcache.remote.prune.GRACE", -10.0)
    assert pruned(builder, max_bytes=0).entries == [key("a")]
