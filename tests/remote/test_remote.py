"""A remote that is slow, gone or rude costs a start one wait and one warning, and is not asked for ever."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stores import key, put, target
from test_tier import fetched

from stitchcache.remote import Flight, Remote

BUCKET = "s3://bucket/cache"


@pytest.fixture
def filled(node, server, keys):
    """A server that has an entry of 400 KB and its target."""
    builder = node(BUCKET, "builder")
    put(builder, "a", [os.urandom(200_000), os.urandom(200_000)])
    builder.put_target(key("t"), target(key("a")))
    server.asked.clear()
    return server


def starts(cache, count: int) -> list[float]:
    """Seconds that each of some starts lost on the remote, which gave nothing."""
    spent = []
    for _ in range(count):
        began = time.monotonic()
        cache.tier.records(cache, key("t"))
        assert cache.tier.entry(cache, key("a")) is None
        cache.tier.pieces(cache, [key("p"), key("q")])
        spent.append(time.monotonic() - began)
    return spent


@pytest.mark.parametrize("fault", [403, 429, 503, "reset", "slow", "hang"])
def test_a_start_loses_the_wait_at_most_and_three_failures_are_the_last(node, filled, fault, caplog, full):
    cache = node(BUCKET)
    filled.fault = fault
    spent = starts(cache, 4)
    # A busy machine gets more room than the second and a fifth that are promised.
    assert max(spent) < (1.2 if full else 2.5), spent
    assert cache.tier.remote.broken
    asked = len(filled.asked)
    assert starts(cache, 2)[0] < 0.05
    assert len(filled.asked) == asked, "it is not asked any more"
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING and BUCKET in r.getMessage()]
    assert len(warned) == 1, [r.getMessage() for r in warned]
    assert cache.counted()["remote.failed"] == 3


def test_a_slow_remote_is_waited_for_as_long_as_it_sends_enough(node, filled, monkeypatch):
    """What arrives gives waiting time back, so a large entry may take longer than the wait."""
    monkeypatch.setattr("stitchcache.remote._SLOWEST", 2048)
    monkeypatch.setattr("stitchcache.remote._CHUNK", 1024)
    builder = node(BUCKET)
    put(builder, "slow", [os.urandom(20_000), os.urandom(20_000)])
    cache = node(BUCKET)
    filled.fault = "slow"
    began = time.monotonic()
    assert cache.tier.entry(cache, key("slow")) is not None
    assert time.monotonic() - began > 1.5


def test_a_remote_that_recovers_is_used(node, filled):
    cache = node(BUCKET)
    filled.fault = 503
    cache.tier.records(cache, key("t"))
    filled.fault = ""
    assert fetched(cache) is not None


def test_a_stopped_server_costs_the_wait_once(node, tmp_path, keys, monkeypatch, full):
    """SIGSTOP: the kernel goes on accepting connections, and nobody answers."""
    port_file = tmp_path / "port"
    script = Path(__file__).with_name("s3_server.py")
    server = subprocess.Popen([sys.executable, str(script), str(port_file)])
    try:
        while not (port_file.exists() and port_file.read_text()):
            time.sleep(0.02)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port_file.read_text()}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        builder = node(BUCKET)
        put(builder, "a", [b"1"])
        server.send_signal(signal.SIGSTOP)
        cache = node(BUCKET)
        (spent,) = starts(cache, 1)
        assert 0.9 < spent < (1.2 if full else 2.5)
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait()


def test_a_start_that_lost_its_wait_uploads_nothing_and_ends(server, tmp_path, keys, fresh_process):
    server.fault = "hang"
    began = time.monotonic()
    fresh_process(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent.parent / "store")!r})
        from stores import put, key
        from stitchcache.cache import Cache
        cache = Cache({str(tmp_path / "node")!r}, remote="{BUCKET}")
        assert cache.tier.entry(cache, key("a")) is None
        put(cache, "a", [b"1"])
        """
    )
    assert time.monotonic() - began < 6


def test_a_forked_child_of_a_process_that_asked_does_not_hang(node, filled):
    cache = node(BUCKET)
    assert fetched(cache) is not None
    child = os.fork()
    if child == 0:
        good = cache.tier.entry(cache, key("z")) is None and not cache.tier.remote.usable
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_without_obstore_a_start_goes_on_and_is_told(node, url, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "obstore", None)
    cache = node(url)
    assert cache.tier.entry(cache, key("a")) is None
    assert "stitchcache[remote]" in caplog.text


def test_waiting_is_given_back_by_bytes_and_never_more_than_there_was():
    flight = Flight()
    flight.run(lambda: (time.sleep(0.3), flight.note(1 << 30), time.sleep(0.3)), ())
    assert 0.5 < flight.wait(0.8, 1.0) < 0.9
    assert flight.error is None


def test_a_directory_is_created_and_only_the_first_creates_an_object(tmp_path):
    remote = Remote(f"file://{tmp_path}/new/er", lambda *_: None)
    assert remote.now(remote.write, "x/y", b"1") is True
    assert remote.now(remote.write, "x/y", b"2") is False
    assert remote.now(remote.read, "x/y", 10) == b"1"
    assert remote.now(remote.write, "x/y", b"3", replace=True) is True
    assert remote.now(remote.read, "x/z", 10) is None
    assert [each["path"] for each in remote.now(remote.listed, "")] == ["x/y"]
