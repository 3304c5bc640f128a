"""Every Python and shell snippet of README, tutorial and how-tos runs; numbers that pages begin with hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from snippets.run_page import SHELLS, SHOWN, snippets

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    DOCS / "tutorial.md",
    DOCS / "coming-from.md",
    *sorted(DOCS.glob("howto-*.md")),
]
RUNNER = Path(__file__).parent / "snippets" / "run_page.py"


def run_page(page: Path, directory: Path) -> tuple[list[str], str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(REPOSITORY), str(RUNNER.parent), os.environ.get("PYTHONPATH", "")]
        ),
        "STITCHCACHE_DIR": str(directory / "cache"),
        "STITCHCACHE_KEYS": str(directory / "keys"),
        "COLUMNS": "100",
    }
    directory.joinpath("cache").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(page)],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])["ran"], done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path):
    found = snippets(page)
    unmarked = [f"{page.name}:{s.line}" for s in found if s.language in ("python", *SHELLS) and not s.reason]
    if not unmarked:
        return
    ran, said = run_page(page, tmp_path)
    assert ran == unmarked
    if page.stem == "tutorial":
        # What the page says that its runs print.
        assert re.findall(r"^(None|direct|graph) \{", said, re.MULTILINE) == ["None", "direct"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_block_is_of_a_known_language(page):
    for snippet in snippets(page):
        assert snippet.language in ("python", *SHELLS, *SHOWN), f"{page.name}:{snippet.line}"
    # Indented blocks would be seen by no test.
    outside = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\n\n    \S", outside)


# -- what pages begin with ------------------------------------------------------------------------


def first_paragraphs(page: str) -> str:
    return (DOCS / page).read_text().split("\n## ")[0]


def test_versions_are_those_that_the_package_asks_for():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    torch = next(each for each in project["dependencies"] if each.startswith("torch"))
    low, high = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", torch).groups()
    python = project["requires-python"].removeprefix(">=")
    newest = f"{high.split('.')[0]}.{int(high.split('.')[1]) - 1}"
    page = first_paragraphs("compatibility.md")
    assert f"torch {low} up to, but not including, {high}, and Python {python} or newer" in page
    assert f"Python {python} or newer" in first_paragraphs("tutorial.md")
    readme = (REPOSITORY / "README.md").read_text()
    assert f"Python {python} or newer" in readme
    assert f"torch {low} to {newest}" in readme


def test_pages_count_their_own_sections():
    page = (DOCS / "howto-explain.md").read_text()
    assert "Four places tell you what" in page
    assert len(re.findall(r"^## \d\. ", page, re.MULTILINE)) == 4


@pytest.mark.skipif("STITCHCACHE_FULL" not in os.environ, reason="traces 16 layers: set STITCHCACHE_FULL=1")
def test_sixteen_equal_layers_cost_as_much_as_four():
    assert "16 equal layers cost as much as 4" in (REPOSITORY / "README.md").read_text()
    # Pieces are what costs: their keys are those of what is compiled.
    script = """
import stitchcache
from stitchcache.demo.decoder import ATTENTION, DecoderConfig, build

for layers in (4, 16):
    model, args = build(DecoderConfig(layers=layers, width=8, heads=2))
    done = stitchcache.compile(model, args, splitting_ops=[ATTENTION], backend="eager", check="none")
    print(len({piece.key for piece in done.artifact.pieces}), len(done.artifact.pieces))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "3 5\n3 17\n", done.stderr
