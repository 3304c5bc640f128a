"""Hostile pickles import, open and start nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_corpus_of_hostile_pickles_imports_opens_and_starts_nothing():
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(here / "hostile_pickles.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 60
