"""Shared by all tests: caches of their own, models, fresh processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_log_level():
    """What a test makes quieter or louder is so for it alone."""
    logger = logging.getLogger("stitchcache")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def own_environment(tmp_path_factory, monkeypatch):
    """No test sees the user's cache or settings."""
    for name in list(os.environ):
        if name.startswith("STITCHCACHE_") and name != "STITCHCACHE_FULL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("STITCHCACHE_DIR", str(tmp_path_factory.mktemp("default-cache")))
    monkeypatch.setenv("STITCHCACHE_KEYS", str(tmp_path_factory.getbasetemp() / "no-keys"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def compiled_root(tmp_path_factory) -> Path:
    """One cache for all tests that compile with a real compiler."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def fresh_process(tmp_path):
    """Run Python source in a new process; returns the JSON object that it prints last."""

    def run(source: str, *, env: dict[str, str] | None = None, check: bool = True, timeout: float = 600):
        script = tmp_path / f"script{len(list(tmp_path.glob('script*.py')))}.py"
        script.write_text(textwrap.dedent(source))
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        lines = done.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines and lines[-1].startswith(("{", "[")) else done

    return run
