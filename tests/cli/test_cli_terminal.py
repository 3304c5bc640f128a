"""The command on terminals of several widths, in shells that complete, and interrupted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from cli_entries import key, put
from cli_environment import environment

# Facts stay whole, so that paths can be copied; help and tables fit the terminal.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("columns", [60, 100, 200])
@pytest.mark.parametrize("words", [["--help"], ["report", "--help"], ["ls"]], ids=" ".join)
def test_lines_fit_the_terminal(run_on_terminal, tmp_path, columns, words):
    put(tmp_path, key("a"), "A model with quite a long name")
    where = [] if "--help" in words else ["--cache", "."]
    shown = run_on_terminal(*words, *where, columns=columns, env={"NO_COLOR": "1"}, cwd=tmp_path)
    assert max(len(COLOUR.sub("", line)) for line in shown.splitlines()) <= columns


def test_no_color(run_on_terminal, tmp_path):
    put(tmp_path, key("a"))
    colours = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38|48)")
    for words in (["inspect", key("a")[:8], "--code"], ["ls"], ["report"]):
        shown = run_on_terminal(*words, "--cache", tmp_path, env={"NO_COLOR": "1"})
        assert not colours.search(shown), words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(tmp_path, shell):
    put(tmp_path, key("a"), "Decoder")

    def complete(*words: str) -> str:
        line = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        if shell == "fish":
            line["COMP_CWORD"] = words[-1]
        return run(_STITCHCACHE_COMPLETE=f"{shell}_complete", **line)

    def run(**more: str) -> str:
        source = "from stitchcache.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", source],
            env=environment(STITCHCACHE_DIR=str(tmp_path), **more),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout

    assert "_stitchcache_completion" in run(_STITCHCACHE_COMPLETE=f"{shell}_source")
    assert "inspect" in complete("stitchcache", "ins")
    assert "--html" in complete("stitchcache", "inspect", "--h")
    assert key("a")[:12] in complete("stitchcache", "inspect", key("a")[:2])
    assert key("a")[:12] not in complete("stitchcache", "inspect", "zz")
    if shutil.which(shell):
        script = run(_STITCHCACHE_COMPLETE=f"{shell}_source")
        assert subprocess.run([shell, "-n"], input=script, text=True, check=False).returncode == 0


def test_interrupted(run_cli, tmp_path):
    (tmp_path / "nets.py").write_text("raise KeyboardInterrupt\n")
    done = run_cli("prewarm", "nets.py:net", "--cache", tmp_path / "cache", cwd=tmp_path)
    assert done.status == 130
    assert "What was stored until now is kept" in done.err
    assert "Aborted" not in done.err
