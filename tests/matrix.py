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
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
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
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["test"], *extras["sign"]]
    wanted = [need for need in asked if not need.startswith(("torch", "stitchcache["))]
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


def measure(interpreter: str, home: Path, arguments: list[str], jobs: int) -> dict[str, Any]:
    """Run the tests file by file; return counts, what failed, and why tests were skipped.

    One process a file, so that nothing of one file's models, modes or threads is met by another.
    """
    shutil.rmtree(home / "reports", ignore_errors=True)
    (home / "reports").mkdir(parents=True)
    # As if it were installed: torch.compile finds the backend by its entry point.
    facts = home / "site" / "stitchcache-0.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: stitchcache\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (facts / "entry_points.txt").write_text("\n".join(lines))
    search = [str(ROOT), str(home / "site"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "STITCHCACHE_DIR": str(home / "caches" / "stitchcache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "caches" / "inductor"),
    }
    plain = [argument for argument in arguments if not argument.startswith("tests")]
    places = [ROOT / argument for argument in arguments if argument.startswith("tests")] or [ROOT / "tests"]
    files = sorted(f for place in places for f in ([place] if place.is_file() else place.rglob("test_*.py")))

    def one(path: Path) -> Counts:
        name = path.relative_to(ROOT).as_posix()
        report = home / "reports" / (name.replace("/", "-") + ".xml")
        command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        with report.with_suffix(".log").open("w") as log:
            subprocess.run([*command, name, *plain], cwd=ROOT, env=env, stdout=log, stderr=log, check=False)
        return read(report, name)

    total = Counts()
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(one, files):
            total.passed += found.passed
            total.failed += found.failed
            total.skipped += found.skipped
    return {"arguments": arguments, **asdict(total)}


@dataclass
class Counts:
    """What tests did: how many passed, which failed, how many were skipped for which reason."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def read(report: Path, name: str) -> Counts:
    """Counts of one file's report."""
    counts = Counts()
    if not report.exists():
        counts.failed.append(f"{name} (pytest wrote no report)")
        return counts
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        skip = case.find("skipped")
        if bad:
            # Addresses in names differ from run to run.
            counts.failed.append(re.sub(r"0x[0-9a-f]+", "0x...", f"{name}::{case.get('name')}"))
        elif skip is not None:
            counts.skipped[re.sub(r"\s+", " ", skip.get("message", "no reason"))] += 1
        else:
            counts.passed += 1
    return counts


def table(results: list[dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines = ["| torch | Python | tests | passed | failed | skipped |", "|---|---|---|---|---|---|"]
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


def keep(base: Path, torch: str, python: str, interpreter: str, arguments: list[str], jobs: int) -> None:
    """Run a pair's tests and write down what they did."""
    name = f"torch-{torch}-py-{python}"
    found = {"torch": torch, "python": python, **measure(interpreter, base / name, arguments, jobs)}
    (base / f"{name}.json").write_text(json.dumps(found, indent=1))
    print(table([found]))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where environments and results are kept")
    parser.add_argument("--torch", nargs="*", default=[])
    parser.add_argument("--python", nargs="*", default=["3.11"])
    parser.add_argument("--cuda-libraries", type=Path)
    parser.add_argument("--here", action="store_true", help="run with this interpreter and its torch")
    parser.add_argument("--jobs", type=int, default=1, help="test files at a time")
    parser.add_argument("--prepare-only", action="store_true", help="make environments, run nothing")
    parser.add_argument("--write", type=Path, help="put the table of all results into this page")
    known = sys.argv[1:]
    arguments = known[known.index("--") + 1 :] if "--" in known else []
    given = parser.parse_args(known[: known.index("--")] if "--" in known else known)
    given.dir.mkdir(parents=True, exist_ok=True)
    pairs = [(torch, python) for torch in given.torch for python in given.python]
    for torch, python in pairs:
        interpreter = environment(given.dir, torch, python, given.cuda_libraries)
        if not given.prepare_only:
            keep(given.dir, torch, python, str(interpreter), arguments, given.jobs)
    if given.here:
        version = importlib.metadata.version("torch").partition("+")[0]
        python = ".".join(platform.python_version_tuple()[:2])
        keep(given.dir, version, python, sys.executable, arguments, given.jobs)
    if given.write:
        results = [json.loads(path.read_text()) for path in sorted(given.dir.glob("torch-*.json"))]
        page = given.write.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        given.write.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
