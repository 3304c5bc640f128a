"""Run jobs in forked child processes.

A forked child has the model, the ops that were registered by hand, and everything that was imported,
without a second start-up; a crash stays inside it. torch's data loader relies on the same: threads of
the parent do not exist in the child, so the child runs torch on one thread.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from stitchcache.errors import BackendError, PieceCrashError, StitchCacheError


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do in a child.

    Args:
        name: For errors: the piece.
        run: Called in the child; its result must survive pickling.
        log: File that gets what the child prints.
    """

    name: str
    run: Callable[[], Any]
    log: Path


def available() -> bool:
    """Whether children can be forked here and now."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def run_all(jobs: Sequence[Job], limit: int, backend: str) -> Iterator[tuple[int, Any]]:
    """Run jobs, at most ``limit`` at a time.

    Args:
        jobs: What to run; order is kept for starting.
        limit: How many children at once, at least 1.
        backend: For errors.

    Yields:
        A job's index and result, as they finish.

    Raises:
        StitchCacheError: What a job raised; the other children are ended first.
        PieceCrashError: A child was killed by a signal.
        BackendError: A child failed otherwise.
    """
    running: dict[Connection, tuple[int, multiprocessing.process.BaseProcess]] = {}
    todo = list(enumerate(jobs))[::-1]
    try:
        while todo or running:
            while todo and len(running) < max(1, limit):
                index, job = todo.pop()
                process, connection = _start(job)
                running[connection] = (index, process)
            for ready in wait(list(running)):
                connection = ready  # type: ignore[assignment]
                index, process = running.pop(connection)
                yield index, _finish(jobs[index], process, connection, backend)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _start(job: Job) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, sender), name=f"stitchcache-{job.name}")
    with warnings.catch_warnings():
        # Python 3.12 warns whenever a process with threads forks; the child keeps to one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    return process, receiver


def _child(job: Job, sender: Connection) -> None:
    """Body of a child: what it prints goes to the job's log."""
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        sender.send((True, job.run()))
    except StitchCacheError as error:
        sender.send((False, error))


def _finish(job: Job, process: Any, connection: Connection, backend: str) -> Any:
    try:
        fine, result = connection.recv()
    except EOFError:
        process.join()
        raise _died(job, int(process.exitcode or 0), backend) from None
    finally:
        connection.close()
    process.join()
    if not fine:
        raise result
    return result


def _died(job: Job, exit_code: int, backend: str) -> BackendError:
    lines = [line for line in _tail(job.log) if line.strip()]
    said = next(
        (line for line in reversed(lines) if "Error" in line or "error:" in line), lines[-1] if lines else ""
    )
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return PieceCrashError(
            f"piece {job.name}, compiled by {backend}, killed the process that tried it with {name}. "
            "Nothing was stored. The C++ toolchain links something that torch was not built with "
            "(see 'stitchcache doctor'), or memory ran out; backend='eager' works without it.",
            backend=backend,
            piece=job.name,
            exit_code=exit_code,
        )
    return BackendError(
        f"{backend} cannot compile piece {job.name}: {said.strip()[:500]}. "
        "Split at the op that it stumbles over, or use backend='eager'. Last lines:\n"
        + "\n".join(lines[-12:]),
        backend=backend,
        piece=job.name,
    )


def _tail(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-60:]
    except OSError:
        return []
