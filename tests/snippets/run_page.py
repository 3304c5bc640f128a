"""Runs the snippets of a page as a reader would, in a process of its own: ``run_page.py PAGE``.

Snippets of a page share one namespace, one directory and one shell environment. What a page takes as given
(``model``, ``build``, ...) comes from ``given.py``. Pieces run op by op, as compiling all of them would take
minutes: wherever a snippet says nothing about a backend, it is ``eager``.

``<!-- not run: REASON -->`` on the line above a snippet leaves it out. Prints as JSON what was run.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SHELLS = ("sh", "bash")
# What is shown and has nothing to run.
SHOWN = ("text", "dockerfile", "yaml")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- not run: (\S[^\n]*\S) -->\n$")
# A snippet that is a file names it in its first line, or the line above it does.
_FILE_INSIDE = re.compile(r"# (\S+\.py)\n")
_FILE_ABOVE = re.compile(r"as `(\S+\.py)`:\n\n$")


class Snippet(NamedTuple):
    language: str
    text: str
    line: int
    reason: str  # why it is not run; empty where it is
    file: str  # that it is to be saved as


def snippets(page: Path) -> list[Snippet]:
    """All blocks of a page, in order."""
    text = page.read_text()
    found = []
    for block in _FENCE.finditer(text):
        before = text[: block.start()]
        marker, above = _MARKER.search(before), _FILE_ABOVE.search(before)
        inside = _FILE_INSIDE.match(block[2])
        file = inside or above
        reason = marker[1] if marker else ""
        line = before.count("\n") + 2
        found.append(
            Snippet(block[1], block[2], line, reason, file[1] if file and block[1] == "python" else "")
        )
    return found


def take_eager() -> None:
    """Let pieces run op by op where nothing else is asked for."""
    from stitchcache.pipeline.find import Request

    check = Request.__post_init__

    def eager(request: Request) -> None:
        if request.backend == "aoti":
            object.__setattr__(request, "backend", "eager")
        check(request)

    Request.__post_init__ = eager


def run_page(page: Path) -> None:
    import given

    take_eager()
    work = Path.cwd()
    _shims(work / "bin")
    environment = {**os.environ, "PATH": f"{work / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    names, words = getattr(given, page.stem.lower().replace("-", "_"), lambda: ({}, {}))()
    module = ModuleType("snippets")
    sys.modules["snippets"] = module
    vars(module).update(names)
    ran, left_out = [], []
    for snippet in snippets(page):
        where = f"{page.name}:{snippet.line}"
        if snippet.language in SHOWN:
            continue
        if snippet.reason:
            left_out.append([where, snippet.reason])
            continue
        text = snippet.text
        for word, meant in words.items():
            text = text.replace(word, str(meant))
        print(f"-- {where}", file=sys.stderr, flush=True)
        if snippet.file:
            Path(snippet.file).parent.mkdir(parents=True, exist_ok=True)
            Path(snippet.file).write_text(text)
        elif snippet.language == "python":
            exec(compile("\n" * (snippet.line - 1) + text, str(page), "exec"), vars(module))
        elif snippet.language in SHELLS:
            environment = _run_shell(text, environment, where)
        else:
            sys.exit(f"{where}: a block in {snippet.language or 'no language'}; write python, sh or text")
        ran.append(where)
    print(json.dumps({"ran": ran, "left_out": left_out}))


def _shims(directory: Path) -> None:
    """``stitchcache`` and ``python`` as the snippets call them."""
    directory.mkdir()
    for name, how in (("stitchcache", "--command"), ("python", "--script")):
        file = directory / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "run_page.py"}" {how} "$@"\n')
        file.chmod(0o755)


def _run_shell(text: str, environment: dict[str, str], where: str) -> dict[str, str]:
    """Run lines of a shell; returns the environment that they leave."""
    after = Path("environment").absolute()
    script = f"{text}\nenv -0 > '{after}'\n"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode != 0:
        sys.exit(f"{where}: exit status {done.returncode}\n{text}")
    return dict(each.split("=", 1) for each in after.read_text().split("\0") if "=" in each)


def main() -> None:
    sys.path.insert(0, str(HERE))
    how, *words = sys.argv[1:]
    if how == "--command":
        # The other commands import no torch.
        if words[0] in ("prewarm", "explain"):
            take_eager()
        from stitchcache.cli import main as command

        sys.argv[1:] = words
        try:
            command()
        except SystemExit as ended:
            # Entries that differ are a finding, and what the reader of a page is to see.
            sys.exit(0 if words[0] == "diff" and ended.code == 1 else ended.code)
    elif how == "--script":
        take_eager()
        sys.argv = words
        sys.path[0] = os.getcwd()
        runpy.run_path(words[0], run_name="__main__")
    else:
        run_page(Path(how))


if __name__ == "__main__":
    main()
