"""A fleet: processes as nodes, each with a root of its own, and one remote. Each piece is compiled once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stores import key, read_back

from stitchcache.cache import Cache

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    # A busy machine may take a second to answer: a node that gives up compiles by itself.
    monkeypatch.setenv("STITCHCACHE_REMOTE_WAIT", "20")


def begin(script: str, **job) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / script), json.dumps(job)],
        env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[dict, str]]:
    try:
        outcomes = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outcomes
    return [(json.loads(out.splitlines()[-1]), err) for out, err in outcomes]


def run_fleet(tmp_path: Path, url: str, count: int, backend: str, **more) -> None:
    jobs = [
        {
            "root": str(tmp_path / f"root-{n}"),
            "remote": url,
            "target": n % 3,
            "backend": backend,
            "ready": str(tmp_path / f"ready.{n}"),
            "go": str(tmp_path / "go"),
            **more,
        }
        for n in range(count)
    ]
    processes = [begin("fleet_node.py", **job) for job in jobs]
    while len(list(tmp_path.glob("ready.*"))) < count:
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    (tmp_path / "go").touch()
    done = end(processes)
    assert all(each["equal"] for each, _ in done)
    pieces = [path for path in Path(url[7:]).joinpath("pieces").rglob("*") if path.is_file()]
    assert sum(each["compiled"] for each, _ in done) == len(pieces) > 3
    assert not [path for path in Path(url[7:]).joinpath("leases").rglob("*") if path.is_file()]
    # Restarted with empty roots: nothing is traced or compiled.
    for n in range(3 if count > 4 else 1):
        job = {**jobs[n], "root": str(tmp_path / f"again-{n}"), "ready": str(tmp_path / f"again.{n}")}
        ((again, err),) = end([begin("fleet_node.py", **job)])
        assert (again["hit"], again["compiled"], again["equal"]) == ("direct", 0, True), err[-2000:]
        assert again["requests"] == 2 + again["blobs"]
        if count > 4:
            ((local, _),) = end([begin("fleet_node.py", **job)])
            assert local["requests"] == 0
            print(f"from an empty root {again['seconds']:.3f} s, from a local one {local['seconds']:.3f} s")
            assert again["seconds"] < local["seconds"] + 0.3


def test_a_fleet_compiles_each_piece_once_and_restarts_warm(tmp_path, url, keys, full):
    run_fleet(tmp_path, url, 16 if full else 3, "eager", seconds=0.2)


def test_a_server_that_compiles_aside_takes_what_another_node_makes(tmp_path, url, keys):
    """``on_miss="eager"``: its child leaves to the other node what that one has begun, and fetches it."""
    job = {"remote": url, "target": 0, "backend": "eager"}
    other = begin("fleet_node.py", **job, root=str(tmp_path / "other"), seconds=2.0)
    while other.poll() is None and not any(each.is_file() for each in Path(url[7:], "leases").rglob("*")):
        time.sleep(0.05)
    how = {"on_miss": "eager", "options": {"stitchcache.nice": 0}}
    aside = begin("fleet_node.py", **job, root=str(tmp_path / "mine"), more=how)
    (made, _), (served, said) = end([other, aside])
    assert made["equal"]
    assert served["equal"]
    assert served["compiled"] + made["compiled"] == served["blobs"] == 2, said
    assert made["compiled"] > 0


@pytest.mark.compile
@pytest.mark.skipif(os.environ.get("STITCHCACHE_FULL") != "1", reason="takes minutes: STITCHCACHE_FULL=1")
def test_a_fleet_with_real_pieces(tmp_path, url, keys):
    run_fleet(tmp_path, url, 16, "aoti")


def share(tmp_path: Path, url: str, root: str, lifetime: float = 1.0, **more) -> subprocess.Popen[str]:
    return begin("share_node.py", root=str(tmp_path / root), remote=url, lifetime=lifetime, **more)


def test_a_holder_that_is_killed_anywhere_costs_the_others_its_lifetime(tmp_path, url, keys, full):
    """Killed before any of its requests: another node finishes, and nothing half written is served."""
    ((whole, _),) = end([share(tmp_path, f"{url}-whole", "whole")])
    assert sorted(whole["compiled"]) == [0, 1, 2]
    asked = whole["asked"]
    points = range(1, asked + 1) if full else [round(1 + n * (asked - 1) / 9) for n in range(0, 10, 3)]
    for point in points:
        own = f"{url}-{point}"
        first = share(tmp_path, own, f"first-{point}", kill_at=point)
        assert first.wait(60) in (0, -9), first.communicate()
        ((second, err),) = end([share(tmp_path, own, f"second-{point}")])
        assert second["seconds"] < 1.0 + 3.0, (point, second, err)
        third = Cache(tmp_path / f"third-{point}", remote=own)
        assert third.tier.records(third, key("t"))
        assert third.tier.entry(third, key("a")) is not None
        assert read_back(third, key("a")) == [f"piece {n}".encode() * 1000 for n in range(3)]
        assert third.verify().clean
        assert not third.counted().get("remote.refused")


def test_nodes_whose_clocks_differ_share_all_the_same(tmp_path, url, keys):
    """By minutes: no time of a node is compared with another's, only whether a lease changes."""
    nodes = [share(tmp_path, url, f"n{n}", lifetime=2.0, clock=n * 150 - 300) for n in range(4)]
    done = [each for each, _ in end(nodes)]
    assert sorted(n for each in done for n in each["compiled"]) == [0, 1, 2]
