"""Who tells a recorder which code runs in a thread: ``sys.monitoring``, or a profile function.

A profile function sees every call. From Python 3.12 on code that has nothing to tell is seen once: a capture
runs thousands of lines of torch's Python for each op. Python 3.11 has no such thing, so there the profile
function is taken away for calls of torch that were watched once.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from stitchcache.keys.reads import FOR_PEOPLE, SYSTEM
from stitchcache.keys.walk import in_stdlib, module_stands_by_version, stands_by_version
from stitchcache.torchside import active_modes, dispatch_modes
from stitchcache.torchside.ops import OpOverload

if TYPE_CHECKING:
    from stitchcache.keys.recorder import SourceRecorder

_monitoring: Any = getattr(sys, "monitoring", None)
# Numbers that no kind of tool has for itself: the others are debuggers', coverage's and cProfile's.
_NUMBERS = (3, 4)
_NOT_ALL = "another profiler was installed while the model was captured; compile without it"


@contextlib.contextmanager
def told(recorder: SourceRecorder) -> Iterator[None]:
    """A block of which a recorder is told what this thread runs; it refuses where that may not be all."""
    previous: Any = sys.getprofile()
    profile = None
    with contextlib.ExitStack() as stack:
        number = _free_number()
        if number is not None:
            stack.enter_context(_monitored(recorder, number))
        else:
            profile = _profile_function(recorder)
            # Modes of somebody else's would see what is asked of a call's arguments. Since Python 3.12 all
            # code is instrumented anew after each change of the profile function.
            if _monitoring is None and not active_modes():
                stack.enter_context(FamiliarCalls(profile, recorder))
        if profile is not previous:
            sys.setprofile(profile)
        yield
        if sys.getprofile() is not profile:
            recorder.refuse(_NOT_ALL)
        if sys.getprofile() is not previous:
            sys.setprofile(previous)


def _free_number() -> int | None:
    for number in _NUMBERS if _monitoring is not None else ():
        # Another thread may be recording too, or somebody's tool may have the number.
        with contextlib.suppress(ValueError):
            _monitoring.use_tool_id(number, "stitchcache")
            return number
    return None


@contextlib.contextmanager
def _monitored(recorder: SourceRecorder, number: int) -> Iterator[None]:
    """Told by ``sys.monitoring``. Events are the process's, so those of other threads are left out."""
    get_ident, disable, events = threading.get_ident, _monitoring.DISABLE, _monitoring.events
    thread, user, system = get_ident(), recorder.user, SYSTEM
    # Code whose calls are told, held, so that an id stays its own; and calls that are the same each time.
    calling: dict[int, types.CodeType] = {}
    fixed: dict[int, frozenset[int]] = {}
    telling = 0

    def on_start(code: types.CodeType, _offset: int, *thrown: BaseException) -> Any:
        nonlocal telling
        # A throw cannot be disabled, and tells nothing new but of a generator that was begun before.
        if get_ident() != thread or (thrown and id(code) in recorder.seen):
            return None
        # An exception in here is raised where the code runs, which may go on all the same: this stays then.
        telling += 1
        enough = recorder.started(sys._getframe(1), code)
        if id(code) not in calling and has_calls_to_tell(code.co_filename):
            calling[id(code)] = code
            _monitoring.set_local_events(number, code, events.CALL)
        telling -= 1
        return disable if enough and not thrown else None

    def on_call(code: types.CodeType, offset: int, function: Any, first: Any) -> Any:
        nonlocal telling
        # The library makes 200,000 calls.
        if id(code) not in user and id(function) not in system:
            known = fixed.get(id(code))
            if known is None:
                known = fixed[id(code)] = fixed_calls(code)
            return disable if offset in known else None
        if type(function) is not types.FunctionType and get_ident() == thread:
            telling += 1
            function = _as_profiled(function, first)
            if issubclass(type(function), types.BuiltinFunctionType):
                recorder.called(sys._getframe(1), function)
            telling -= 1
        return None

    told_by = dict.fromkeys((events.PY_START, events.PY_RESUME, events.PY_THROW), on_start)
    for event, callback in (*told_by.items(), (events.CALL, on_call)):
        _monitoring.register_callback(number, event, callback)
    _monitoring.set_events(number, sum(told_by))
    # An earlier recorder may have seen enough of some code.
    _monitoring.restart_events()
    yield
    _monitoring.set_events(number, 0)
    for code in calling.values():
        _monitoring.set_local_events(number, code, 0)
    for event in (*told_by, events.CALL):
        _monitoring.register_callback(number, event, None)
    _monitoring.free_tool_id(number)
    if telling:
        recorder.refuse(_NOT_ALL)


def _as_profiled(function: Any, first: Any) -> Any:
    """What a profile function would be given for a call: methods made in C with what they are bound to."""
    if type(function) is types.MethodType:
        function, first = function.__func__, function.__self__
    if type(function) is types.MethodDescriptorType and function.__objclass__ in type(first).__mro__:
        # Without its second argument this ends Python 3.12 for methods that want to know their class.
        return function.__get__(first, type(first))
    return function


def fixed_calls(code: types.CodeType) -> frozenset[int]:
    """Where the library's code calls what a global name leads to: the same each time."""
    if not in_stdlib(code.co_filename):
        return frozenset()
    loaded, found = set(), set()
    for item in dis.get_instructions(code):
        place = item.positions
        if place is None or place.col_offset is None:
            continue
        begins = place.lineno, place.col_offset
        # A global that is loaded to be called stands where that call begins.
        if item.opname == "LOAD_GLOBAL" and (item.arg or 0) & 1:
            loaded.add(begins)
        elif item.opname.startswith("CALL") and begins in loaded:
            loaded.remove(begins)
            found.add(item.offset)
    return frozenset(found)


def has_calls_to_tell(filename: str) -> bool:
    """Whether calls of C code in a file count: not in torch's own, nor in what only writes for people."""
    return filename not in FOR_PEOPLE if in_stdlib(filename) else not stands_by_version(filename)


def _profile_function(recorder: SourceRecorder) -> Callable[[types.FrameType, str, Any], None]:
    """What Python calls on every call and return: millions of times for a deep model, hence a closure."""
    quiet: set[int] = set()
    started, called, user, system = recorder.started, recorder.called, recorder.user, SYSTEM

    def profile(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            if id(arg) in system or id(frame.f_code) in user:
                called(frame, arg)
        elif event == "call":
            code = frame.f_code
            if id(code) not in quiet and started(frame, code):
                quiet.add(id(code))

    return profile


# To hash one of these, or to look at a value of these kinds, runs nobody's code.
_DESCRIPTORS = {types.MethodDescriptorType, types.MethodWrapperType, types.WrapperDescriptorType}
_FUNCTIONS = frozenset({types.BuiltinFunctionType, types.FunctionType, OpOverload, *_DESCRIPTORS})
_OF_PYTHON = frozenset({bool, int, float, complex, str, slice, types.NoneType, types.EllipsisType})
_OF_TORCH = frozenset({torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype, torch.device, torch.layout})
_PLAIN = _OF_PYTHON | _OF_TORCH | {torch.Size, torch.memory_format}


class FamiliarCalls(TorchFunctionMode):
    """Takes the profile function away while torch does what it was seen doing.

    A call is familiar when an earlier one of the same function, with arguments of the same kinds (texts and
    truth values: the same) on the same kinds of devices and under the same kinds of dispatch modes, was
    watched, and the recorder's ``noticed`` did not grow below it: whether somebody else's code runs there,
    such as a kernel for one of torch's ops, shows in the first call. Calls that are given anything but
    torch's own tensors and plain values never are, nor is any under a mode of the user's.
    """

    def __init__(self, profile: Callable[..., Any], recorder: SourceRecorder) -> None:
        super().__init__()
        self._profile, self._recorder = profile, recorder
        self._familiar: set[tuple[Any, ...]] = set()
        self._within = False
        self._versioned = functools.cache(module_stands_by_version)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call, watched or not."""
        given = kwargs or {}
        # Dynamo would trace what follows; another profile function is not ours to take away.
        if self._within or torch.compiler.is_dynamo_compiling() or sys.getprofile() is not self._profile:
            return func(*args, **given)
        self._within = True
        sys.setprofile(None)
        try:
            call = self._call_kind(func, args, given)
            if call in self._familiar:
                return func(*args, **given)
        finally:
            sys.setprofile(self._profile)
            self._within = False
        before = self._recorder.noticed
        result = func(*args, **given)
        if call is not None and self._recorder.noticed == before:
            self._familiar.add(call)
        return result

    def _call_kind(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        # What a user's op does may be known from an earlier capture, and run only for another size.
        users = isinstance(func, OpOverload) and func.namespace not in {"aten", "prims"}
        modes = [type(mode) for mode in dispatch_modes()]
        kinds: list[Any] = [func, *modes, *kwargs]
        known = type(func) in _FUNCTIONS and not users
        known = known and all(self._versioned(mode.__module__) for mode in modes)
        known = known and all(self._add_kind(kinds, value) for value in (*args, *kwargs.values()))
        return tuple(kinds) if known else None

    def _add_kind(self, kinds: list[Any], value: Any) -> bool:
        """Add what kind of argument a value is; ``False`` if that cannot be told without running code."""
        kind = type(value)
        kinds.append(kind)
        if kind in _PLAIN:
            # These choose between ways through torch's code; numbers are sizes.
            if kind is bool or kind is str:
                kinds.append(value)
            return True
        if kind is tuple or kind is list:
            kinds.append(len(value))
            return all(self._add_kind(kinds, item) for item in value)
        own = issubclass(kind, torch.Tensor) and self._versioned(kind.__module__)
        if own:
            kinds.append(value.device.type)
        return own
