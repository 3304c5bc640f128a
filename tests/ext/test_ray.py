"""Prewarming over a real Ray cluster on this machine, with a node killed on the way."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra 'ray'")
pytestmark = pytest.mark.skipif(
    not os.environ.get("STITCHCACHE_FULL"), reason="a cluster of three nodes: STITCHCACHE_FULL=1"
)

TARGETS = """
import os
import time
import torch
import stitchcache
from stitchcache import Target


def built(width):
    # Long enough that a node dies in the middle of some.
    time.sleep(float(os.environ.get("TARGETS_TAKE", "0")))
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU()).eval(), (torch.ones(2, width),)


def made(width):
    return Target(f"width-{width}", lambda: built(width), backend=os.environ.get("TARGETS_BACKEND", "eager"))


targets = [made(width) for width in range(4, 16)]
broken = Target("broken", lambda: 3, backend="eager")
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    (tmp_path / "ray_targets.py").write_text(TARGETS)
    here = Path(__file__).parents[2]
    path = os.pathsep.join([str(tmp_path), str(here), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TARGETS_TAKE", "1")
    monkeypatch.delitem(sys.modules, "ray_targets", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [
        # Each with a cache of its own, as on machines of their own.
        cluster.add_node(num_cpus=1, env_vars={"STITCHCACHE_DIR": str(tmp_path / f"node{index}")})
        for index in range(3)
    ]
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def test_a_node_dies_and_the_caches_of_the_fleet_are_whole(cluster, tmp_path):
    import stitchcache
    from stitchcache.ext.ray import prewarm

    whole, (victim, *_) = cluster
    cache, told = stitchcache.Cache(tmp_path / "fleet"), []
    asked: list[str] = []

    def kill() -> None:
        # Once it is in the middle of a target, after it has come to one.
        while not list((tmp_path / "node0").glob("entries/*/*")):
            time.sleep(0.2)
        time.sleep(1)
        whole.remove_node(victim, allow_graceful=False)

    def resources(name: str) -> dict[str, int]:
        asked.append(name)
        return {"num_cpus": 1}

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    names = [f"width-{width}" for width in range(4, 16)]
    report = prewarm("ray_targets:targets", cache=cache, resources=resources, on_progress=told.append)
    assert not killer.is_alive(), "the node is to die before the last target is done"
    assert report.ok, [str(result.error) for result in report.failed]
    assert [result.name for result in report.results] == asked == names
    assert cache.verify().clean
    assert {header.graph_hash for header in cache.entries()} == {each.graph_hash for each in report.results}
    assert {progress.target for progress in told} == set(names)
    # Nothing is traced here any more.
    again = stitchcache.prewarm("ray_targets:targets", cache=cache)
    assert {result.status for result in again.results} == {"direct"}


def test_a_target_that_fails_does_not_stop_the_others(cluster, tmp_path):
    import stitchcache
    from stitchcache.ext.ray import prewarm

    cache = stitchcache.Cache(tmp_path / "fleet")
    report = prewarm(["ray_targets:broken", "ray_targets:targets"], cache=cache)
    failed, *rest = report.results
    assert (failed.status, type(failed.error).__name__) == ("failed", "TargetError")
    assert all(result.stored for result in rest)
