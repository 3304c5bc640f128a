"""What holds for all of torchside."""

from __future__ import annotations

import subprocess
import sys


def without_gil(code):
    """Run code in a process that says it has no GIL, as a free-threaded Python's does."""
    code = f"import sys; sys._is_gil_enabled = lambda: False; import stitchcache; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_python_without_the_gil_is_told_how_to_switch_it_on():
    done = without_gil("stitchcache.compile")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: stitchcache was not tried without the GIL: run Python with -X gil=1 or PYTHON_GIL=1."
    )


def test_commands_that_read_need_no_gil(tmp_path):
    argv = ["stitchcache", "ls", "--cache", str(tmp_path)]
    done = without_gil(f"from stitchcache.cli import main; sys.argv = {argv!r}; main()")
    assert done.returncode == 0, done.stderr
