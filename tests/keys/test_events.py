"""Code is told to a recorder whoever tells: ``sys.monitoring``, or a profile function."""

import contextlib
import importlib.util
import logging
import sys
import textwrap
import threading
import types
from pathlib import Path

import pytest

from stitchcache.keys import events
from stitchcache.keys.recorder import SourceRecorder

monitored = pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 brings sys.monitoring")
SOURCE = """
    import contextlib, logging, os

    BY, AFTER, LOGGED = 2.0, 3.0, 4.0

    def f():
        return BY

    def draw():
        try:
            while True:
                yield BY
        except KeyError:
            yield AFTER

    def careful():
        try:
            return f()
        except Exception:
            return None

    class Handler(logging.Handler):
        def emit(self, record):
            late()

    def late():
        return LOGGED

    def logs(twice=False):
        logging.getLogger("events").error("said")
        return late() if twice else None

    class Calls:
        def last(self, key):
            with contextlib.ExitStack() as stack:
                stack.callback(key, ".")

    def stars(names):
        return open(*names)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's."""
    path = tmp_path / "events_mine.py"
    path.write_text(textwrap.dedent(SOURCE))
    spec = importlib.util.spec_from_file_location("events_mine", path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "events_mine", made)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(params=["as it comes", "profiled"])
def teller(request, monkeypatch):
    """Both that may tell; from Python 3.12 on the second takes over where numbers are taken."""
    if request.param == "profiled":
        monkeypatch.setattr(events, "_NUMBERS", ())


def read(recorder):
    return {name.rpartition(":")[2] for name in dict(recorder.globals)}


def test_who_tells_is_what_python_has(mine):
    with SourceRecorder():
        profiled = sys.getprofile() is not None
    assert profiled is (sys.version_info < (3, 12))


def test_code_that_was_seen_is_seen_again_by_the_next_recorder(mine, teller):
    for _ in range(3):
        with SourceRecorder() as recorder:
            mine.f()
        assert read(recorder) == {"BY"}
        assert [source.module for source in recorder.sources] == ["events_mine"]


def test_recorders_within_each_other_all_see(mine):
    with contextlib.ExitStack() as stack:
        recorders = [stack.enter_context(SourceRecorder()) for _ in range(3 if events._monitoring else 1)]
        mine.f()
    assert [read(recorder) for recorder in recorders] == [{"BY"}] * len(recorders)


def test_another_threads_code_is_not_told_and_does_not_hide_ours(mine, teller):
    for ours in (False, True):
        begin, done = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: (begin.wait(30), mine.f(), done.set()))  # noqa: B023
        thread.start()
        with SourceRecorder() as recorder:
            begin.set()
            assert done.wait(30)
            if ours:
                mine.f()
        thread.join(30)
        assert read(recorder) == ({"BY"} if ours else set())


@monitored
def test_two_threads_record_at_once(mine):
    found, both = [], threading.Barrier(4)

    def record(function):
        with SourceRecorder() as recorder:
            both.wait(30)
            function()
            both.wait(30)
        found.append(recorder)

    threads = [threading.Thread(target=record, args=(mine.f if n % 2 else mine.late,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # More than there are numbers: two are told by profile functions.
    assert sorted(sorted(read(recorder)) for recorder in found) == [["BY"], ["BY"], ["LOGGED"], ["LOGGED"]]
    assert [events._monitoring.get_tool(number) for number in events._NUMBERS] == [None, None]


def test_a_generator_that_began_before(mine, teller):
    resumed, thrown = mine.draw(), mine.draw()
    next(resumed), next(thrown)
    with SourceRecorder() as recorder:
        next(resumed)
    assert "BY" in read(recorder)
    with SourceRecorder() as recorder:
        thrown.throw(KeyError())
    assert "AFTER" in read(recorder)


def test_what_a_log_handler_runs_counts_where_the_model_runs_it(mine, teller):
    logger = logging.getLogger("events")
    handler = mine.Handler()
    logger.addHandler(handler)
    try:
        with SourceRecorder() as alone:
            mine.logs()
        with SourceRecorder() as recorder:
            mine.logs(twice=True)
    finally:
        logger.removeHandler(handler)
    assert "LOGGED" not in read(alone)
    assert "LOGGED" in read(recorder)


def test_the_library_may_call_another_function_the_second_time(mine, teller):
    holder = types.SimpleNamespace(keys=[len, mine.os.stat])
    with SourceRecorder() as recorder:
        mine.Calls().last(holder.keys[0])
    assert recorder.unsound is None
    with SourceRecorder() as recorder:
        for key in holder.keys:
            mine.Calls().last(key)
    assert "makes the library call stat" in recorder.unsound


def test_a_call_with_stars_is_a_call(mine, teller):
    with SourceRecorder() as recorder:
        mine.stars([mine.__file__]).close()
    assert "open" in recorder.unsound


def test_an_error_of_ours_that_the_model_swallows_is_a_refusal(mine, teller, monkeypatch):
    noted = SourceRecorder._read_globals

    def fails(self, code, namespace):
        if code.co_name == "f":
            raise RecursionError
        return noted(self, code, namespace)

    monkeypatch.setattr(SourceRecorder, "_read_globals", fails)
    with SourceRecorder() as recorder:
        mine.careful()
    assert "profiler" in recorder.unsound


def test_a_profile_function_rests_meanwhile(mine, teller):
    seen = []

    def profiler(frame, event, arg):
        seen.append(frame.f_code.co_name)

    sys.setprofile(profiler)
    try:
        with SourceRecorder() as recorder:
            mine.f()
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert "f" not in seen
    assert recorder.unsound is None


@monitored
def test_numbers_that_are_taken_are_left_alone(mine):
    for number in events._NUMBERS:
        events._monitoring.use_tool_id(number, "somebody's")
    try:
        with SourceRecorder() as recorder:
            mine.f()
        assert [events._monitoring.get_tool(number) for number in events._NUMBERS] == ["somebody's"] * 2
    finally:
        for number in events._NUMBERS:
            events._monitoring.free_tool_id(number)
    assert read(recorder) == {"BY"}
    assert recorder.unsound is None


@monitored
def test_nothing_is_left_behind(mine):
    with SourceRecorder():
        mine.f()
        mine.logs()
    monitoring = events._monitoring
    for number in events._NUMBERS:
        assert monitoring.get_tool(number) is None
        monitoring.use_tool_id(number, "look")
        assert monitoring.get_events(number) == 0
        assert monitoring.get_local_events(number, mine.f.__code__) == 0
        monitoring.free_tool_id(number)


@monitored
def test_calls_that_are_fixed(monkeypatch):
    def code(g, x):
        len(g(x))
        g(len)(len(x))
        iter()(x)
        print(x, end=str(g))
        x.print(g)
        return [sorted(g), (sorted if x else g)(x)]

    assert not events.fixed_calls(code.__code__)
    monkeypatch.setattr(events, "in_stdlib", lambda filename: True)
    fixed = events.fixed_calls(code.__code__)
    positions = {item.offset: item.positions for item in events.dis.get_instructions(code)}
    lines = Path(__file__).read_text().splitlines()
    texts = [
        lines[positions[at].lineno - 1][positions[at].col_offset : positions[at].end_col_offset]
        for at in sorted(fixed)
    ]
    assert texts == ["len(g(x))", "len(x)", "iter()", "str(g)", "print(x, end=str(g))", "sorted(g)"]
