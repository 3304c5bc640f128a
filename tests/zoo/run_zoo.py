"""Every model of the zoo through ``compile`` and through ``torch.compile``, cold and in a second process.

    python tests/zoo/run_zoo.py --dir /tmp/zoo                               # all that are not done yet
    python tests/zoo/run_zoo.py --dir /tmp/zoo --only bert --backend aoti    # some, with compiled pieces
    python tests/zoo/run_zoo.py --dir /tmp/zoo1 --part 1/12                  # a part, where many cores are
    python tests/zoo/run_zoo.py --dir /tmp/zoo --write docs/models.md        # results so far into the page

Results are lines of JSON in the directory: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
MARKS = ("<!-- begin zoo -->", "<!-- end zoo -->")
SECONDS = 300  # for one model in one process


def child(names: list[str], road: str, backend: str, results: Path) -> None:
    """Start each of these models in this process, and write what happened."""
    import torch
    import zoo_models

    import stitchcache

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    logging.getLogger("stitchcache").setLevel(logging.INFO)
    for name in names:
        said: dict[str, Any] = {"name": name, "road": road, "backend": backend}
        signal.alarm(SECONDS)
        try:
            torch.manual_seed(0)
            said["stage"] = "build"
            model, args, kwargs = zoo_models.zoo()[name]()
            began = time.perf_counter()
            said["stage"] = road
            said |= _start(stitchcache, torch, road, backend, model, args, kwargs)
            said["seconds"] = round(time.perf_counter() - began, 3)
            del said["stage"]
        except (Exception, SystemExit) as error:  # noqa: BLE001  (what is measured is whether it raises)
            said["error"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:600]
        signal.alarm(0)
        with results.open("a") as file:
            file.write(json.dumps(said) + "\n")


def _start(
    stitchcache: Any, torch: Any, road: str, backend: str, model: Any, args: Any, kwargs: Any
) -> dict[str, Any]:
    if road == "compile":
        compiled = stitchcache.compile(model, args, kwargs, backend=backend)
        pieces = compiled.artifact.pieces
        facts = {"hit": compiled.cache_hit, "pieces": len(pieces), "distinct": len({p.key for p in pieces})}
        if compiled.cache_hit != "direct":
            facts["reason"] = compiled.explain().reason
    else:
        compiled, facts = torch.compile(model, backend="stitchcache", options={"backend": backend}), {}
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("stitchcache").addHandler(handler)
    with torch.no_grad():
        check = stitchcache.verify(model, compiled, args, kwargs)
    logging.getLogger("stitchcache").removeHandler(handler)
    if road != "compile":
        graphs = [line for line in said if ": graph hit " in line or ": compiled " in line]
        warm = bool(graphs) and all(": graph hit " in line for line in graphs)
        facts = {"hit": "graph" if warm else None, "graphs": len(graphs)}
    return {**facts, "check": check.state, "difference": check.difference, "why": check.reason}


def _done(results: Path) -> set[tuple[str, str, str]]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {(r["name"], r["road"], r["backend"]) for r in map(json.loads, lines)}


def run(directory: Path, names: list[str], roads: list[str], backend: str, batch: int) -> None:
    """Two processes for each batch of models on each road: the second one finds what the first has left."""
    for road in roads:
        todo = [name for name in names if (name, road, backend) not in _done(directory / "warm.jsonl")]
        for begin in range(0, len(todo), batch):
            for phase in ("cold", "warm"):
                results = directory / f"{phase}.jsonl"
                wanted = [n for n in todo[begin : begin + batch] if (n, road, backend) not in _done(results)]
                env = {
                    **os.environ,
                    "STITCHCACHE_DIR": str(directory / f"cache-{road}"),
                    "PYTHONPATH": os.pathsep.join([str(HERE), str(TOP), os.environ.get("PYTHONPATH", "")]),
                }
                words = [sys.executable, __file__, "--dir", str(directory), "--child", phase]
                words += ["--road", road, "--backend", backend, "--only", *wanted]
                if wanted:
                    subprocess.run(words, env=env, check=False)


def table(directory: Path) -> str:
    """The results as a table in Markdown."""
    found: dict[tuple[str, str], dict[tuple[str, str], Any]] = {}
    for phase in ("cold", "warm"):
        path = directory / f"{phase}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            record = json.loads(line)
            found.setdefault((record["name"], record["backend"]), {})[record["road"], phase] = record
    rows, good, why = [], 0, []
    for (name, backend), records in sorted(found.items(), key=lambda item: (item[0][1] != "eager", item[0])):
        cold, warm = (records.get(("compile", phase), {}) for phase in ("cold", "warm"))
        if not warm:
            continue
        second = records.get(("torch.compile", "warm"), {})
        right = warm.get("hit") == "direct" and warm.get("check") == "agreed"
        good += right
        if not right:
            reason = warm.get("error") or warm.get("why") or warm.get("reason") or ""
            why.append(f"- **{name}**: {reason}")
        other = f"{second['hit'] or 'none'}, {second['check']}" if "check" in second else "error"
        cells = [
            name, backend, "no" if "error" in cold else "yes", warm.get("check") or "-",
            warm.get("hit") or ("-" if "error" in warm else "none"),
            f"{cold['pieces']}/{cold['distinct']}" if "pieces" in cold else "-",
            str(cold.get("seconds", "-")), str(warm.get("seconds", "-")),
            other if second else "-",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    head = (
        "| model | pieces by | captured | against eager | second process | pieces/distinct | cold, s "
        "| warm, s | second process of torch.compile |\n|---|---|---|---|---|---|---|---|---|"
    )
    counted = f"{good} of {len(rows)} are direct hits in a second process and agree with eager."
    return "\n".join([counted, "", head, *rows, "", "Those that are not:", "", *(why or ["none"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of names")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="each N-th of them, from the I-th on")
    parser.add_argument("--road", nargs="*", default=["compile", "torch.compile"])
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--batch", type=int, default=10, help="models a process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    if given.child:
        child(given.only, given.road[0], given.backend, given.dir / f"{given.child}.jsonl")
        return
    if given.write:
        text = given.write.read_text()
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        given.write.write_text(f"{before}{MARKS[0]}\n{table(given.dir)}\n{MARKS[1]}{after}")
        return
    sys.path.insert(0, str(HERE))
    import zoo_models

    known = zoo_models.names()
    parts = [part for part in given.only or [""] if part not in known]
    names = [name for name in known if name in given.only or any(part in name for part in parts)]
    first, step = (int(number) for number in given.part.split("/"))
    run(given.dir, names[first - 1 :: step], given.road, given.backend, given.batch)
    print(table(given.dir))


if __name__ == "__main__":
    main()
