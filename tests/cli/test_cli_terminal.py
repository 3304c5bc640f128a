"""The command on terminals of several widths, in shells that complete, and interrupted."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest
from cli_entries import key, put
from cli_environment import environment

from stitchcache.cli import commands

# Facts stay whole, so that paths can be copied; help and tables fit the terminal.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("columns", [60, 100, 200])
@pytest.mark.parametrize("words", [["--help"], ["report", "--help"], ["ls"]], ids=" ".join)
def test_lines_fit_the_terminal(run_on_terminal, tmp_path, columns, words):
    put(tmp_path, key("a"), "A model with quite a long name")
    where = [] if "--help" in words else ["--cache", "."]
    shown = run_on_terminal(*words, *where, columns=columns, env={"NO_COLOR": "1"}, cwd=tmp_path)
    assert max(len(COLOUR.sub("", line)) for line in shown.splitlines()) <= columns


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_help_is_grouped_with_examples(run_on_terminal, columns):
    shown = COLOUR.sub("", run_on_terminal("--help", columns=columns)).replace("\r", "")
    for title in ("Compile:", "Look:", "Keep in order:", "Machines and settings:", "Trust and move:"):
        assert f"\n{title}\n" in shown
    assert "\n  Examples:\n    stitchcache prewarm " in shown
    # One column for all groups.
    assert {
        re.match(r"  [a-z]+ +", line).end()
        for line in shown.splitlines()
        if re.match(r"  [a-z]+ +[A-Z]", line)
    } == {11}


def test_examples_are_what_the_commands_take():
    with click.Context(commands, info_name="stitchcache") as above:
        for name in commands.list_commands(above):
            epilog = commands.get_command(above, name).epilog
            examples = re.findall(r"  stitchcache (.*)", epilog)
            assert examples
            for example in examples:
                # Names of options that are unknown, and values that make no sense, are errors here.
                found, command, rest = commands.resolve_command(above, shlex.split(example.partition(">")[0]))
                assert found == name
                command.make_context(found, rest, parent=above)
            for width in (60, 100, 200):
                with click.Context(commands.get_command(above, name), info_name=name, parent=above) as here:
                    here.terminal_width = width
                    assert max(map(len, here.get_help().splitlines())) <= width, name


def test_the_beginning_of_a_name_is_enough(run_cli, tmp_path):
    put(tmp_path, key("a"), "Decoder")
    assert (
        run_cli("ins", key("a")[:8], "--cache", tmp_path).out
        == run_cli("inspect", key("a")[:8], "--cache", tmp_path).out
    )
    several = run_cli("pr")
    assert several.status == 2
    assert "'pr' is the beginning of prewarm, prune; type more of it" in several.err
    assert "Usage: stitchcache inspect" in run_cli("ins", "--help").out


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
