"""The caller runs a piece as torch's runner does, and lets others run meanwhile."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache.errors import BackendError
from stitchcache.pieces import find_compiler
from stitchcache.torchside import load_library, load_with_caller, load_with_runner
from stitchcache.torchside.caller import append_caller, compile_caller

pytestmark = pytest.mark.compile


class Mixed(nn.Module):
    """Several results, one an integer; takes long on many rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x, shift):
        y = torch.relu(self.first(x)) + shift
        for _ in range(4):
            y = torch.relu(self.second(y))
        return y, y.sum(), y.argmax(-1)


@pytest.fixture(scope="session")
def library(compiled_root):
    """A piece's library, and the tensors that it takes after the arguments."""
    cache = stitchcache.Cache(compiled_root)
    torch.manual_seed(0)
    model = Mixed().eval()
    rows = stitchcache.Dim("rows", min=2, max=100_000)
    compiled = stitchcache.compile(
        model, (torch.randn(4, 96), torch.randn(96)), dynamic_shapes=({0: rows}, None), cache=cache
    )
    (piece,) = compiled.artifact.pieces
    return str(cache.blob_path(piece.blob)), model


def in_order(model, rows):
    """Arguments, and inputs in the order in which the graph uses them."""
    x, shift = torch.randn(rows, 96), torch.randn(96)
    first, second = model.first, model.second
    return x, shift, [x, first.weight, first.bias, shift, second.weight, second.bias]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_both(library, rows):
    path, model = library
    ours, theirs = load_with_caller(path, "cpu"), load_with_runner(path, "cpu")
    _, _, inputs = in_order(model, rows)
    with torch.no_grad():
        return ours(list(inputs)), theirs(list(inputs))


@pytest.mark.parametrize("rows", [2, 5, 1000])
def test_results_are_those_of_torchs_runner(library, rows):
    ours, theirs = run_both(library, rows)
    assert [type(item) for item in ours] == [torch.Tensor] * len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape, one.stride(), one.requires_grad) == (
            other.dtype,
            other.shape,
            other.stride(),
            False,
        )
        assert torch.equal(one, other)


def test_inputs_are_given_up(library):
    path, model = library
    run = load_with_caller(path, "cpu")
    inputs = in_order(model, 3)[2]
    counts = [sys.getrefcount(item) for item in inputs]
    given = list(inputs)
    with torch.no_grad():
        results = run(given)
    assert given == []
    assert [sys.getrefcount(item) for item in inputs] == counts
    assert len(results) >= 3


@pytest.mark.parametrize("wrong", [None, 3, "text"])
def test_what_is_no_tensor_is_refused(library, wrong):
    path, model = library
    run = load_with_caller(path, "cpu")
    inputs = in_order(model, 3)[2]
    with pytest.raises(TypeError, match="tensors only"):
        run([*inputs[:-1], wrong])
    with torch.no_grad():
        assert len(run(list(inputs))) >= 3


def test_only_a_library_with_a_caller_is_taken(tmp_path, library):
    path = tmp_path / "piece.so"
    path.write_bytes(b"no library")
    assert load_with_caller(str(path), "cpu") is None
    assert load_with_caller(str(tmp_path / "none.so"), "cpu") is None
    caller = compile_caller(find_compiler())
    append_caller(path, caller)
    with pytest.raises(RuntimeError, match=r"piece\.so"):
        load_with_caller(str(path), "cpu")
    path.write_bytes(caller.read_bytes())
    append_caller(path, caller)
    with pytest.raises(RuntimeError, match="no library of AOTInductor"):
        load_with_caller(str(path), "cpu")
    # What is appended is no library.
    (tmp_path / "text").write_bytes(b"text")
    path = tmp_path / "other.so"
    path.write_bytes(Path(library[0]).read_bytes())
    append_caller(path, tmp_path / "text")
    assert load_with_caller(str(path), "cpu") is None
    assert load_with_runner(str(path), "cpu") is not None


@pytest.mark.usefixtures("one_thread")
def test_another_thread_runs_while_a_piece_does(library):
    """With torch's runner it would stand still for the whole call."""
    path, model = library
    run = load_with_caller(path, "cpu")
    inputs = in_order(model, 60_000)[2]
    woke: list[float] = []
    stop = threading.Event()

    def wake():
        while not stop.is_set():
            woke.append(time.perf_counter())
            time.sleep(0.0005)

    with torch.no_grad():
        run(list(inputs))
        other = threading.Thread(target=wake)
        other.start()
        began = time.perf_counter()
        run(list(inputs))
        ended = time.perf_counter()
    stop.set()
    other.join()
    during = [at for at in woke if began < at < ended]
    assert len(during) >= 3


def turn_of(thread):
    """Nanoseconds of a thread's turns on a core, as Linux has them since 6.12; 0 before."""
    attributes = (ctypes.c_uint64 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 315, "aarch64": 275}[os.uname().machine]
    assert libc.syscall(number, thread, attributes, ctypes.sizeof(attributes), 0) == 0
    return attributes[3]


LONG_TURN = 100_000_000


@pytest.fixture
def in_long_turns(library, one_thread):
    """Starts a thread that calls a long piece until it is told to end; its turns before and after."""
    if not turn_of(0) or "\nSeccomp:\t0\n" not in Path("/proc/self/status").read_text():
        pytest.skip("this kernel knows no turns of a thread's own, or its calls are filtered")
    path, model = library
    call = load_with_caller(path, "cpu")
    *_, tensors = in_order(model, 20_000)
    over, found = threading.Event(), []

    def work():
        torch.set_num_threads(1)
        found.append(turn_of(0))
        while not over.is_set():
            call(list(tensors))
        found.extend([turn_of(0), os.sched_getscheduler(0)])

    worker = threading.Thread(target=work)
    worker.start()

    def end():
        over.set()
        worker.join()
        return found

    deadline = time.monotonic() + 60
    while turn_of(worker.native_id) != LONG_TURN and time.monotonic() < deadline:
        time.sleep(0.0005)
    yield worker, end
    end()


def test_a_long_piece_lets_threads_go_first_that_wake(in_long_turns):
    worker, end = in_long_turns
    assert any(turn_of(worker.native_id) == LONG_TURN for _ in range(1000) if not time.sleep(0.0005))
    before, after, _ = end()
    assert before == after < LONG_TURN


def test_what_others_change_meanwhile_stays(in_long_turns):
    worker, end = in_long_turns
    os.sched_setscheduler(worker.native_id, os.SCHED_BATCH, os.sched_param(0))
    time.sleep(0.2)
    assert end()[-1] == os.SCHED_BATCH


def test_many_calls_at_once_give_each_its_own(library):
    path, model = library
    run = load_with_caller(path, "cpu")
    wrong: list[int] = []

    def work(number):
        torch.manual_seed(number)
        with torch.no_grad():
            for _ in range(20):
                rows = int(torch.randint(2, 200, ()))
                x, shift, inputs = in_order(model, rows)
                found = next(item for item in run(inputs) if item.shape == (rows, 96))
                if not torch.allclose(found, model(x, shift)[0], rtol=1e-4, atol=1e-4):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_library_on_a_noexec_mount_is_loaded_from_memory(library, tmp_path):
    """As a runtime may mount the volume of an image."""
    path, model = library
    place = tmp_path / "volume"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "mode=0755,noexec", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        there = place / "piece"
        there.write_bytes(Path(path).read_bytes())
        fds = len(os.listdir("/proc/self/fd"))
        with open(there, "rb") as file:
            loaded = [load_library(each, "cpu") for each in (there, Path(f"/proc/self/fd/{file.fileno()}"))]
        _, _, inputs = in_order(model, 5)
        with torch.no_grad():
            expected = load_with_runner(path, "cpu")(list(inputs))
            for piece in loaded:
                assert all(map(torch.equal, piece(list(inputs)), expected))
        assert len(os.listdir("/proc/self/fd")) <= fds + 1, "but for the caller, which stays open"
        with pytest.raises(BackendError, match="noexec"):
            load_library(place / "gone", "cpu")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
