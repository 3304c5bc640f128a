"""Load a fresh piece in a process of its own, where children cannot be forked.

A library that was linked against the wrong C++ runtime dies in its constructor, and takes its process
with it. Run as ``python -m stitchcache.pieces.trial BACKEND FILE DEVICE``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stitchcache.errors import BackendError, PieceCrashError


def load_elsewhere(backend: str, path: Path, device: str, piece: str) -> None:
    """Load a piece in a fresh process.

    Args:
        backend: The backend's name.
        path: The piece.
        device: Where it will run.
        piece: Its name, for errors.

    Raises:
        PieceCrashError: The process died of it.
        BackendError: It cannot be loaded.
    """
    command = [sys.executable, "-m", "stitchcache.pieces.trial", backend, str(path), device]
    search = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    env = {**os.environ, "PYTHONPATH": search}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise PieceCrashError(
            f"piece {piece}, compiled by {backend}, killed the process that loaded it (signal "
            f"{-done.returncode}). Nothing was stored. The C++ toolchain links something that torch was not "
            "built with (see 'stitchcache doctor'); backend='eager' works without it.",
            backend=backend,
            piece=piece,
            exit_code=done.returncode,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BackendError(
            f"piece {piece}, compiled by {backend}, cannot be loaded: {last}. Nothing was stored.",
            backend=backend,
            piece=piece,
        )


def main() -> None:
    """Load what the command line names."""
    from stitchcache.pieces import get_backend

    backend, path, device = sys.argv[1:4]
    get_backend(backend).load(Path(path), device)


if __name__ == "__main__":
    main()
