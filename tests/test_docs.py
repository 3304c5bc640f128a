"""The site is built without a warning: a broken link is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason="needs the extra 'docs'")
    words = [sys.executable, "-m", "sphinx", "-q", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stitchcache inspect [OPTIONS] PREFIX" in (tmp_path / "commands.html").read_text()
    assert "stitchcache.compile_blocks" in (tmp_path / "reference.html").read_text()
