"""Two processes with something changed between them: never a wrong direct hit, and no needless miss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scenarios import SCENARIOS

HERE = Path(__file__).parent
OUT_OF_REACH: dict[str, str] = {}


def run(side, directory, names, *, seed, flags=()):
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *flags, str(HERE / "scenarios_run.py"), side, str(directory), *names],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(directory, files):
    for name, text in files.items():
        path = directory / name
        if text is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        path.write_text(text)
        yield path, before


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both sides of every scenario, grouped by the second interpreter's flags."""
    found = {}
    for flags in sorted({scenario.flags for scenario in SCENARIOS.values()}):
        names = [name for name, scenario in SCENARIOS.items() if scenario.flags == flags]
        home = tmp_path_factory.mktemp("scenarios")
        for index, name in enumerate(names):
            list(write(home / str(index) / "project", SCENARIOS[name].files))
        first = run("first", home, names, seed=1)
        for index, name in enumerate(names):
            scenario, place = SCENARIOS[name], home / str(index) / "project"
            for path, before in write(place, scenario.then):
                if before is not None and scenario.keep_times:
                    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            if scenario.move:
                place.rename(place.with_name("moved"))
        second = run("second", home, names, seed=2, flags=flags.split())
        found |= {name: (first[name], second[name]) for name in names}
    return found


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if not scenario.same])
def test_no_wrong_direct_hit(results, name):
    first, second = results[name]
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert first["eager"] != second["eager"], "void: nothing changed"
    if second["hit"] is not None:
        assert second["got"] == second["eager"], f"a wrong {second['hit']} hit"


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.same])
def test_what_does_not_matter_is_a_direct_hit(results, name):
    first, second = results[name]
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert second["hit"] == "direct", second["off"]
    assert second["got"] == second["eager"]
