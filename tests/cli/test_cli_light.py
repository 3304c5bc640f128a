"""Reading commands import no torch, and answer at once."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from cli_entries import key, put
from cli_environment import environment

READING = [
    ["ls"],
    ["ls", "--json"],
    ["inspect", key("a")[:8]],
    ["inspect", key("a")[:8], "--html", "/dev/null"],
    ["explain", key("a")[:8]],
    ["explain", key("a")[:8], "--factors", "--json"],
    ["diff", key("a")[:8], key("a")],
    ["diff", key("a")[:8], key("a"), "--html", "/dev/null"],
    ["report"],
    ["report", "--html", "/dev/null"],
    ["verify"],
    ["stats"],
    ["prune", "--max-size", "1G"],
    ["config"],
    ["--help"],
    ["prewarm", "--help"],
    ["explain", "--help"],
    ["demo", "--help"],
    ["--version"],
]
HEAVY = ("torch", "numpy", "rich", "asyncio", "stitchcache.api")
# A tenth of what a command takes on a small cache, each.
SELDOM = {"logging", "pathlib", "shutil", "tempfile", "tarfile", "platformdirs", "filelock"}
LIGHT = ("ls", "inspect", "explain", "diff", "report", "verify", "stats", "prune")


def imported(root, words, names, first="sys"):
    """Which of some modules a command imports, beside what ``first`` has imported."""
    put(root, key("a"))
    source = (
        f"import sys, {first}\n"
        "before = set(sys.modules)\n"
        "from stitchcache.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print(sorted({set(names)!r} & sys.modules.keys() - before), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, *words],
        env=environment(STITCHCACHE_DIR=str(root)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_nothing_heavy_is_imported(tmp_path, words):
    assert imported(tmp_path, words, HEAVY) == "[]"


@pytest.mark.parametrize(
    "words", [words for words in READING if words[0] in LIGHT and "--help" not in words], ids=" ".join
)
def test_what_is_seldom_needed_is_not_imported(tmp_path, words):
    # What the interpreter and click import is theirs to say.
    assert imported(tmp_path, words, SELDOM, first="click") == "[]"


def test_ls_of_an_empty_cache_takes_a_tenth_of_a_second(tmp_path):
    # Processor time, the best of several, and on a busy or slow machine set against the least that any
    # command of this kind takes: what else the machine does must not count.
    ours, least = [], []
    for _ in range(7):
        ours.append(_seconds(["-m", "stitchcache", "ls"], tmp_path))
        least.append(_seconds(["-c", "import click, logging, dataclasses"], tmp_path))
    assert min(ours) <= max(0.150, 3.0 * min(least))


def _seconds(words, root) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words], env=environment(STITCHCACHE_DIR=str(root)), capture_output=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_the_package_alone_imports_no_command():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import stitchcache, sys; print('click' in sys.modules, 'torch' in sys.modules)",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False False\n"


def test_unknown_commands_are_usage(run_cli):
    outcome = run_cli("frobnicate")
    assert outcome.status == 2
    assert "frobnicate" in outcome.err
