"""Run jobs in forked child processes; where there can be none, load fresh pieces in a process of their own.

A forked child has the model, the ops that were registered by hand, and everything that was imported,
without a second start-up; a crash stays inside it. torch's data loader relies on the same: threads of
the parent do not exist in the child, so the child runs torch on one thread, which is new there.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from stitchcache.errors import BackendError, PieceCrashError, StitchCacheError
from stitchcache.pieces import FAILURES
from stitchcache.types import LOOK_THREAD

_PR_SET_PDEATHSIG = 1
# Seconds that a child and its compilers get to clean up.
_PATIENCE = 1.0
# Seconds to wait for a look; one that takes longer may itself wait for whoever wants to fork.
_LONGEST_LOOK = 60.0
# Bytes; tracing recurses deeply, and where the stack of processes is unlimited that of threads is small.
_STACK = 64 << 20
# What compilers and linkers put before what they complain about.
_COMPILER = re.compile(r"(?:fatal )?error: |undefined reference|cannot find -l|No space left")
_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception|Refused)\b")
# A step below the lowest priority: only cores that nobody else wants.
IDLE = 20


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do in a child; names of piece and backend are for errors."""

    name: str
    run: Callable[[], Any]  # its result must survive pickling
    log: Path  # gets what the child prints
    backend: str
    nice: int | None = None  # as of the command of that name, or ``IDLE``; ``None`` keeps the parent's


@dataclass(frozen=True, slots=True)
class Child:
    """A job under way, the one at ``index``."""

    job: Job
    index: int
    process: BaseProcess
    connection: Connection


def available() -> bool:
    """Whether children can be forked here and now.

    Where CUDA works, merely counting its devices spoils it for forked children, and Inductor asks for
    them even when it compiles for the CPU; a daemonic process of multiprocessing may have no children.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    return torch.version.cuda is None or not torch.cuda.is_available()


def run_all(jobs: Sequence[Job], limit: int) -> Generator[tuple[int, Any], None, None]:
    """Run jobs in children, at most ``limit`` at a time; gives index and result of each as it finishes.

    Raises what a job raised, a PieceCrashError for a child that a signal killed, and a BackendError for one
    that failed otherwise. Close the iterator when you leave it early: that ends the children.
    """
    running: dict[int, Child] = {}
    todo = list(enumerate(jobs))[::-1]
    try:
        while todo or running:
            while todo and len(running) < max(1, limit):
                index, job = todo.pop()
                child = start(job, index)
                running[child.process.sentinel] = child
            # The pipe tells of a result, the sentinel of a death: another child forked at the same
            # moment may hold the pipe open, so its end alone would not do.
            ready = set(wait([*running, *(child.connection for child in running.values())]))
            for sentinel, child in list(running.items()):
                if sentinel in ready or child.connection in ready:
                    del running[sentinel]
                    yield child.index, finish(child, _died)
    finally:
        for child in running.values():
            end(child)


def run_here(jobs: Sequence[Job], limit: int) -> Generator[tuple[int, Any], None, None]:
    """As :func:`run_all`, in this process: a crash cannot be caught here.

    Jobs run one after the other. What a job returns is a function for its rest, which is called in a thread,
    beside the jobs after it; its result is the job's.
    """
    waiting: dict[Future[Any], int] = {}

    def ended(futures: Iterable[Future[Any]]) -> Iterator[tuple[int, Any]]:
        for future in futures:
            index = waiting.pop(future)
            with told(jobs[index]):
                result = future.result()
            yield index, result

    with ThreadPoolExecutor(max(1, limit)) as threads:
        try:
            for index, job in enumerate(jobs):
                with told(job):
                    rest = job.run()
                waiting[threads.submit(rest)] = index
                yield from ended([future for future in waiting if future.done()])
            yield from ended(as_completed(list(waiting)))
        finally:
            threads.shutdown(cancel_futures=True)


@contextmanager
def told(job: Job) -> Iterator[None]:
    """Whatever fails in the block is a BackendError that names the job's piece."""
    try:
        yield
    except StitchCacheError:
        raise
    except FAILURES as error:
        raise _failed(job, str(error).splitlines()) from error


_TRY = """
import os, pathlib, sys
answers = os.dup(1)
os.dup2(2, 1)
import torch
from stitchcache.pieces import get_backend
device, loaded = sys.argv[1], []
torch.empty(1, device=device)
for line in sys.stdin:
    backend, _, path = line.rstrip("\\n").partition(" ")
    loaded.append(get_backend(backend).load(pathlib.Path(path), device))
    os.write(answers, b"loaded\\n")
"""


class Trial:
    """A process that loads fresh pieces before this one does, where children cannot be forked.

    A library that was linked against the wrong C++ runtime dies in its constructor, and takes its process
    with it. The process starts beside the compiling and gets one piece after the other.

    Args:
        device: What pieces are loaded for.
    """

    def __init__(self, device: str) -> None:
        self._lock = threading.Lock()
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TRY, device],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def load(self, backend: str, path: Path, piece: str) -> None:
        """Load a piece.

        Raises:
            PieceCrashError: It killed the process.
            BackendError: It cannot be loaded.
        """
        questions: Any = self._process.stdin
        answers: Any = self._process.stdout
        with self._lock:
            # The answer tells, also where the process is gone.
            with suppress(BrokenPipeError):
                questions.write(f"{backend} {path}\n")
                questions.flush()
            if answers.readline() == "loaded\n":
                return
            code = self._process.wait()
            self._log.seek(0)
            lines = [line for line in self._log.read().splitlines() if line.strip()]
        if code < 0:
            raise _crashed(piece, backend, code, lines)
        last = lines[-1] if lines else "it said nothing"
        raise BackendError(
            f"piece {piece}, compiled by {backend}, cannot be loaded: {last}. Nothing was stored.",
            backend=backend,
            piece=piece,
        )

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        with self._process, self._log:
            pass


def start(job: Job, index: int = 0) -> Child:
    """Start a job. Whoever does must :func:`end` it."""
    for thread in threading.enumerate():
        # A child would inherit the locks that a look in the background holds, for ever.
        if thread.name == LOOK_THREAD and thread is not threading.current_thread():
            thread.join(_LONGEST_LOOK)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(job, sender, receiver, os.getpid()), name=f"stitchcache-{job.name}"
    )
    with warnings.catch_warnings():
        # Python 3.12 warns whenever a process with threads forks; the child keeps to one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    return Child(job, index, process, receiver)


def _child(job: Job, sender: Connection, receiver: Connection, parent: int) -> None:
    """Body of a child: what it prints goes to the job's log."""
    if job.nice is not None:
        _give_way(job.nice)
    # A collection here would write to every object of the parent's, and so copy the memory of them all.
    gc.freeze()
    receiver.close()
    # A group of its own, so that compilers that it starts end with it.
    os.setpgid(0, 0)
    # Have the kernel end this process when its parent is killed.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0 and os.getppid() != parent:
        os._exit(1)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_group)
    # Where a server ignores it, or reaps children itself, nobody here would learn how a compiler ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        sender.send((True, _in_new_thread(job.run)))
    except StitchCacheError as error:
        try:
            sender.send((False, error))
        except (pickle.PicklingError, TypeError, AttributeError):
            sender.send((False, BackendError(str(error), backend=job.backend, piece=job.name)))


def _give_way(nice: int) -> None:
    """Lower this process's priority, before it has threads; what it starts inherits that."""
    with suppress(OSError):
        # A server may be a real-time one; a sandbox may forbid this. Idle processes are last at disks, too.
        policy = os.SCHED_IDLE if nice == IDLE else os.SCHED_OTHER
        os.sched_setscheduler(0, policy, os.sched_param(0))
    # It cannot be raised again.
    os.setpriority(os.PRIO_PROCESS, 0, min(max(nice, os.getpriority(os.PRIO_PROCESS, 0)), 19))
    with suppress(OSError):
        # Where memory runs out, this goes and not who serves.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_group(*_: object) -> None:
    """End this process and the groups of its own children, whose compilers would go on alone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(process.pid or 0), signal.SIGTERM)
    os.killpg(0, signal.SIGTERM)


def _in_new_thread(run: Callable[[], Any]) -> Any:
    """Run in a thread that began here.

    OpenMP keeps a team of threads for each thread that ever ran a parallel loop. The one that forked has
    such a team here whose threads do not exist, and a loop that says itself how many threads it wants
    (Inductor's ``cpp.threads``) would wait for them for ever.
    """
    threading.stack_size(_STACK)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        return thread.submit(copy_context().run, run).result()


def end(child: Child) -> None:
    """End a child and what it started, if it has not ended by itself."""
    if child.process.is_alive():
        # Asked first: a compiler removes half-written files then, and precompiled headers are shared.
        signal_group(child, signal.SIGTERM)
        child.process.join(_PATIENCE)
        signal_group(child, signal.SIGKILL)
    child.process.join()
    child.connection.close()


def signal_group(child: Child, number: signal.Signals) -> None:
    """Send a signal to a child and what it started."""
    try:
        os.killpg(int(child.process.pid or 0), number)
    except (ProcessLookupError, PermissionError):
        if child.process.is_alive():
            child.process.kill()


def finish(child: Child, died: Callable[[Job, int, Sequence[str]], StitchCacheError]) -> Any:
    """The result of a child that is done or dead; ``died`` makes an error of its exit code and its lines."""
    answer: tuple[bool, Any] | None = None
    with child.connection, suppress(EOFError, ConnectionError):
        if child.connection.poll():
            answer = child.connection.recv()
    child.process.join()
    if answer is None:
        lines = []
        with suppress(OSError):
            lines = child.job.log.read_text(errors="replace").splitlines()
        raise died(child.job, child.process.exitcode or 0, [line.strip() for line in lines if line.strip()])
    fine, result = answer
    if not fine:
        raise result
    return result


def signal_name(code: int) -> str:
    """The signal of a negative exit code."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _died(job: Job, code: int, lines: Sequence[str]) -> StitchCacheError:
    return _failed(job, lines) if code >= 0 else _crashed(job.name, job.backend, code, lines)


def _crashed(piece: str, backend: str, code: int, lines: Sequence[str]) -> PieceCrashError:
    name, said = signal_name(code), f" It said: {lines[-1][:300]}." if lines else ""
    return PieceCrashError(
        f"piece {piece}, compiled by {backend}, killed the process that tried it with {name}.{said} "
        "Nothing was stored. The C++ toolchain links something that torch was not built with "
        "(see 'stitchcache doctor'), or memory ran out; backend='eager' works without it.",
        backend=backend,
        piece=piece,
        exit_code=code,
    )


def _failed(job: Job, lines: Sequence[str]) -> BackendError:
    """Say what the compiler said first, and how it ended."""
    useful = [line.strip() for line in lines if line.strip()]
    complaints = [line for line in useful if _COMPILER.search(line)]
    ends = [line for line in useful if _EXCEPTION.match(line)] or useful or ["it said nothing"]
    said = complaints[0] if complaints else ends[-1]
    return BackendError(
        f"{job.backend} cannot compile piece {job.name}: {said[:500].rstrip('.')}. "
        "Split at the op that fails, or use backend='eager'. Last lines:\n"
        + "\n".join(line[:300] for line in useful[-12:]),
        backend=job.backend,
        piece=job.name,
    )
