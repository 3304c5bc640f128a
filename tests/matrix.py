"""Run the tests against several versions of torch and Python, and write the table of docs/compatibility.md.

    python tests/matrix.py --dir /tmp/matrix --torch 2.11.0 2.13.0 --python 3.11 3.13 -- -m "not compile"
    python tests/matrix.py --dir /tmp/matrix --write docs/compatibility.md     # the table of all results

Makes one virtual environment a pair below ``--dir`` and keeps it for the next run. Results stay there as
JSON, so that a pair can be run alone. What comes after ``--`` goes to pytest.

torch's builds with CUDA want some 3 GB of libraries each, which the tests never call. ``--cuda-libraries
DIR`` shares one copy, made with ``pip install --target DIR``: torch is then installed without its
dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin matrix -->", "<!-- end matrix -->"
# What torch needs besides CUDA.
PURE = ("filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec")


def environment(base: Path, torch: str, python: str, libraries: Path | None) -> Path:
    """Make or find the virtual environment of a pair; return its interpreter."""
    home = base / f"torch-{torch}-py-{python}"
    interpreter = home / "bin" / "python"
    if (home / "complete").exists():
        return interpreter
    shutil.rmtree(home, ignore_errors=True)
    run([find_python(python), "-m", "venv", str(home)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [need for need in project["dependencies"] if not need.startswith("torch")]
    wanted += project["optional-dependencies"]["test"]
    pip = [str(interpreter), "-m", "pip", "install", "--quiet"]
    if libraries is None:
        run([*pip, f"torch=={torch}", *wanted])
    else:
        run([*pip, "--no-deps", f"torch=={torch}"])
        run([*pip, *PURE, *wanted])
        place = next((home / "lib").glob("python*")) / "site-packages"
        (place / "cuda-libraries.pth").write_text(f"{libraries}\n")
    (home / "complete").touch()
    return interpreter


def find_python(version: str) -> str:
    """An interpreter of a version such as ``3.13``: on PATH, or one of pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = str(pyenv[-1]) if pyenv else shutil.which(f"python{version}")
    if found is None:
        raise SystemExit(f"there is no Python {version}")
    return found


def run(command: list[str]) -> None:
    """Run a command; end the script with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def measure(interpreter: Path, base: Path, torch: str, python: str, arguments: list[str]) -> dict[str, Any]:
    """Run pytest in an environment; return counts, what failed, and why tests were skipped."""
    report = base / f"torch-{torch}-py-{python}.xml"
    report.unlink(missing_ok=True)
    caches = base / f"torch-{torch}-py-{python}" / "caches"
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "STITCHCACHE_DIR": str(caches / "stitchcache"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    command = [str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    with (base / f"torch-{torch}-py-{python}.log").open("w") as log:
        subprocess.run([*command, *arguments], cwd=ROOT, env=env, stdout=log, stderr=log, check=False)
    facts: dict[str, Any] = {"torch": torch, "python": python, "arguments": arguments}
    if not report.exists():
        return {**facts, "passed": 0, "failed": ["pytest wrote no report"], "skipped": {}}
    failed, skipped, passed = [], {}, 0
    for case in ElementTree.parse(report).iter("testcase"):
        where = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if problem is not None:
            failed.append(where)
        elif skip is not None:
            reason = re.sub(r"\s+", " ", skip.get("message", "no reason"))
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    return {**facts, "passed": passed, "failed": failed, "skipped": skipped}


def table(results: list[dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines = [
        "| torch | Python | tests | passed | failed | skipped |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for found in sorted(results, key=lambda r: ([int(n) for n in r["torch"].split(".")], r["python"])):
        asked = " ".join(found["arguments"]).replace("|", "\\|") or "all"
        count = sum(found["skipped"].values())
        lines.append(
            f"| {found['torch']} | {found['python']} | `{asked}` | {found['passed']} | "
            f"{len(found['failed'])} | {count} |"
        )
        pair = f"torch {found['torch']}, Python {found['python']}"
        notes += [f"- {pair}: failed: `{name}`" for name in found["failed"]]
        notes += [f"- {pair}: {number} skipped: {reason}" for reason, number in found["skipped"].items()]
    return "\n".join([*lines, "", *notes])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where environments and results are kept")
    parser.add_argument("--torch", nargs="*", default=[])
    parser.add_argument("--python", nargs="*", default=["3.11"])
    parser.add_argument("--cuda-libraries", type=Path)
    parser.add_argument("--prepare-only", action="store_true", help="make environments, run nothing")
    parser.add_argument("--write", type=Path, help="put the table of all results into this page")
    known = sys.argv[1:]
    arguments = known[known.index("--") + 1 :] if "--" in known else []
    given = parser.parse_args(known[: known.index("--")] if "--" in known else known)
    given.dir.mkdir(parents=True, exist_ok=True)
    for torch in given.torch:
        for python in given.python:
            interpreter = environment(given.dir, torch, python, given.cuda_libraries)
            if not given.prepare_only:
                found = measure(interpreter, given.dir, torch, python, arguments)
                path = given.dir / f"torch-{torch}-py-{python}.json"
                path.write_text(json.dumps(found, indent=1))
                print(table([found]))
    if given.write:
        results = [json.loads(path.read_text()) for path in sorted(given.dir.glob("torch-*.json"))]
        page = given.write.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        given.write.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
