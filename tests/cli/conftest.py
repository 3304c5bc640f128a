"""The command, run as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from cli_environment import environment


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self):
        record = json.loads(self.out)
        assert record["schema"] == 1
        return record


@pytest.fixture(scope="session")
def run_cli():
    def run(*args: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "stitchcache", *map(str, args)],
            env=environment(**(env or {})),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def run_on_terminal():
    """What the command writes to a terminal of a given width."""

    def run(
        *args: object, columns: int = 100, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "stitchcache", *map(str, args)],
            env=environment(TERM="xterm-256color", COLUMNS=str(columns), **(env or {})),
            cwd=cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            written = b""
            while chunk := _read(ours):
                written += chunk
        os.close(ours)
        assert process.returncode == 0, written.decode()
        return written.decode()

    return run


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        # The other end is closed.
        return b""
