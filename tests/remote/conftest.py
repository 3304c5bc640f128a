"""Remotes for tests, and caches as nodes of a fleet have them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("obstore")
pytest.importorskip("cryptography")
sys.path[:0] = [str(Path(__file__).parent.parent / room) for room in ("store", "ext")]

from s3_server import S3, serve  # noqa: E402
from signing import new_keys, public  # noqa: E402

from stitchcache.cache import Cache  # noqa: E402
from stitchcache.ext.sign import Keys  # noqa: E402


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def full() -> bool:
    """Whether the full counts are asked for."""
    return os.environ.get("STITCHCACHE_FULL") == "1"


@pytest.fixture
def server(monkeypatch) -> S3:
    """An S3 server in this process, named by the environment."""
    running = serve()
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def keys(tmp_path, monkeypatch) -> Keys:
    """A fleet's key: all nodes sign with it, and trust it."""
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "fleet-keys"))
    return new_keys(tmp_path / "fleet-keys")


@pytest.fixture
def trusting(tmp_path, keys, monkeypatch) -> Keys:
    """A serving node's keys: it trusts the fleet's, and has none of its own."""
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path / "node-keys"))
    own = Keys()
    own.trust(public(keys), "ci@example.com", {})
    return own


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/remote"


@pytest.fixture
def node(tmp_path):
    """Makes caches with roots of their own: ``node(url)``, or ``node(url, name)`` for the same root again."""
    count = iter(range(1000))

    def make(url: str, name: str | None = None, **how) -> Cache:
        return Cache(tmp_path / (name or f"node-{next(count)}"), remote=url, **how)

    return make


def objects_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
