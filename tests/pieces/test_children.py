"""Jobs in forked children: crashes, failures, clean-up."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from stitchcache.errors import BackendError, PieceCrashError, PieceMismatchError
from stitchcache.pieces import children
from stitchcache.pieces.children import Job, Trial, run_all, run_here
from stitchcache.types import LOOK_THREAD


@pytest.fixture
def job(tmp_path):
    def made(run, name="submod_0"):
        return Job(name=name, run=run, log=tmp_path / f"{name}.log", backend="aoti")

    return made


def results(jobs, limit=2):
    with closing(run_all(jobs, limit)) as running:
        return dict(running)


def killed_by(number):
    """A job that a signal kills, as a broken library would be."""

    def run():
        faulthandler.disable()
        os.kill(os.getpid(), number)

    return run


def no_children():
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    return True


def test_results_come_back_whatever_their_size(job):
    jobs = [job(lambda n=n: bytes(n), f"submod_{n}") for n in (0, 10, 5_000_000)]
    assert {i: len(r) for i, r in results(jobs).items()} == {0: 0, 1: 10, 2: 5_000_000}
    assert no_children()


def test_no_child_inherits_a_lock_of_a_look(job):
    lock, held = threading.Lock(), threading.Event()

    def look():
        with lock:
            held.set()
            time.sleep(0.5)

    threading.Thread(target=look, name=LOOK_THREAD).start()
    held.wait()
    assert results([job(lambda: lock.acquire(timeout=5))]) == {0: True}


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGKILL])
def test_a_killed_child_is_a_crash(job, number):
    with pytest.raises(PieceCrashError, match=number.name) as caught:
        results([job(killed_by(number))])
    assert caught.value.exit_code == -number
    assert caught.value.piece == "submod_0"
    assert no_children()


def test_a_real_time_signal_has_a_name_too(job):
    number = signal.SIGRTMIN + 3
    with pytest.raises(PieceCrashError, match=f"signal {int(number)}"):
        results([job(killed_by(number))])


def test_our_errors_come_back_as_they_are(job):
    def fail():
        raise PieceMismatchError("off by 77", backend="aoti", piece="submod_3", difference=77.0)

    with pytest.raises(PieceMismatchError, match="off by 77") as caught:
        results([job(fail)])
    assert caught.value.difference == 77.0


def test_an_error_that_does_not_pickle_is_still_told(job):
    def fail():
        raise PieceMismatchError("off by 78", piece=lambda: None)

    with pytest.raises(BackendError, match="off by 78"):
        results([job(fail)])


def test_a_result_that_does_not_pickle_is_an_error(job):
    with pytest.raises(BackendError, match="submod_0"):
        results([job(lambda: lambda: None)])


def test_what_the_compiler_said_comes_first(job):
    def fail():
        print("command line of 4000 characters " * 100)
        print("piece.cpp:12:3: error: 'frobnicate' was not declared in this scope")
        print("piece.cpp:40:1: error: expected '}'")
        raise RuntimeError("C++ compile error")

    with pytest.raises(BackendError, match=r"aoti cannot compile piece submod_0: .*frobnicate") as caught:
        results([job(fail)])
    assert len(str(caught.value)) < 6000


def test_a_child_that_exits_without_a_word(job):
    with pytest.raises(BackendError, match="it said nothing"):
        results([job(lambda: os._exit(3))])


def test_the_parent_prints_nothing(job, capfd):
    def talk():
        print("noise")
        os.system("echo more noise; echo noise >&2")
        return 1

    assert results([job(talk)]) == {0: 1}
    assert capfd.readouterr() == ("", "")


def test_a_failure_ends_the_others_and_what_they_started(job, tmp_path):
    marker = tmp_path / "alive"

    def slow():
        subprocess.run(["sh", "-c", f"sleep 2; touch {marker}"], check=False)

    def fail():
        time.sleep(0.3)
        raise PieceMismatchError("wrong")

    began = time.perf_counter()
    with pytest.raises(PieceMismatchError):
        results([job(slow, "a"), job(fail, "b")])
    assert time.perf_counter() - began < 1.8
    assert no_children()
    time.sleep(2)
    assert not marker.exists()


def test_leaving_early_ends_the_children(job):
    with closing(run_all([job(lambda: 1, "a"), job(lambda: time.sleep(60), "b")], 2)) as running:
        next(running)
    assert no_children()


def test_at_most_so_many_at_once(job, tmp_path):
    def count():
        mark = tmp_path / f"running-{os.getpid()}"
        mark.touch()
        time.sleep(0.05)
        seen = len(list(tmp_path.glob("running-*")))
        mark.unlink()
        return seen

    assert max(results([job(count, f"p{i}") for i in range(6)], limit=2).values()) <= 2


def test_no_descriptors_are_left(job):
    before = set(os.listdir("/proc/self/fd"))
    results([job(lambda: 1, "a"), job(lambda: 2, "b")])
    with pytest.raises(PieceCrashError):
        results([job(killed_by(signal.SIGKILL))])
    # A collection may have closed others by now.
    assert set(os.listdir("/proc/self/fd")) <= before


def test_torch_works_in_children_after_threads_were_used(job):
    x = torch.randn(300, 300)
    x @ x
    got = results([job(lambda: float((x @ x).sum()), f"p{i}") for i in range(3)])
    assert all(abs(value - float((x @ x).sum())) < 1.0 for value in got.values())


THREADED = """
import sys
import threading
from pathlib import Path
import torch
from stitchcache.pieces.children import Job, run_all
x = torch.ones(1 << 20)
torch.set_num_threads(4)
print(float((x + x).sum()))
def work():
    # As compiled code does that names its number of threads.
    torch.set_num_threads(4)
    return float((x + x).sum())
print(dict(run_all([Job("a", work, Path(sys.argv[1]), "aoti")], 1)))
"""


def test_loops_in_children_may_ask_for_threads_of_their_own(tmp_path):
    (tmp_path / "threaded.py").write_text(THREADED)
    command = [sys.executable, str(tmp_path / "threaded.py"), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["2097152.0", "{0: 2097152.0}"], done.stderr


PARENT = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from stitchcache.pieces.children import Job, run_all
here = Path(sys.argv[1])
def work():
    (here / f"pid{os.getpid()}").touch()
    time.sleep(60)
for _ in run_all([Job("a", work, here / "a.log", "aoti"), Job("b", work, here / "b.log", "aoti")], 2):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_children_end_with_their_parent(tmp_path, number):
    (tmp_path / "parent.py").write_text(PARENT)
    root = str(Path(children.__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 60
    while len(pids := [int(p.name[3:]) for p in tmp_path.glob("pid*")]) < 2 and time.time() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2
    parent.send_signal(number)
    parent.wait(20)
    deadline = time.time() + 10
    while any(_alive(pid) for pid in pids) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:
        return json.dumps(Path(f"/proc/{pid}/stat").read_text().split()[2]) != '"Z"'
    except OSError:
        return False


def test_in_this_process_failures_are_typed_too(job):
    def fail():
        raise RuntimeError("no kernel")

    assert list(run_here([job(lambda: lambda: 5)], 2)) == [(0, 5)]
    for failing in (fail, lambda: fail):
        with pytest.raises(BackendError, match="no kernel"):
            list(run_here([job(failing)], 2))


def test_rests_run_beside_the_jobs_after_them(job):
    began: list[str] = []
    second = threading.Event()

    def first():
        began.append("first")
        return lambda: second.wait(10)

    def other():
        began.append("second")
        second.set()
        return lambda: "done"

    assert dict(run_here([job(first, "a"), job(other, "b")], 2)) == {0: True, 1: "done"}
    assert began == ["first", "second"]


@pytest.fixture
def broken(tmp_path):
    """A library that is none, and one whose constructor aborts."""
    (tmp_path / "none.so").write_bytes(b"no library")
    source = tmp_path / "abort.cpp"
    source.write_text(
        'extern "C" void abort(void) __attribute__((noreturn));\n'
        "__attribute__((constructor)) static void now() { abort(); }\n"
    )
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", tmp_path / "abort.so"], check=True)
    return tmp_path


@pytest.mark.compile
def test_a_trial_tells_a_crash_from_a_failure(broken):
    with Trial("cpu") as trial, pytest.raises(BackendError, match=r"submod_1.*cannot be loaded"):
        trial.load("aoti", broken / "none.so", "submod_1")
    with Trial("cpu") as trial, pytest.raises(PieceCrashError, match="SIGABRT"):
        trial.load("aoti", broken / "abort.so", "submod_2")
