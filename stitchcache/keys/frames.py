"""What a frame that a profile function is shown says about the call."""

from __future__ import annotations

import os
from types import CodeType, FrameType

from stitchcache.keys.origins import stands_by_version


def is_search(frame: FrameType) -> bool:
    """Whether the import machinery asks somebody's finder where a module is; that runs none of it."""
    caller: FrameType | None = frame
    name = ""
    while caller is not None and not stands_by_version(caller.f_code.co_filename):
        name = caller.f_code.co_name
        caller = caller.f_back
    machinery = caller is not None and caller.f_code.co_filename.startswith("<frozen importlib")
    return machinery and name in {"find_spec", "find_module", "path_hook"}


def receiver_of(frame: FrameType, code: CodeType) -> type | None:
    """The class that a method runs for; ``None`` for a plain function."""
    if not code.co_argcount or not code.co_varnames or code.co_varnames[0] not in {"self", "cls"}:
        return None
    value = frame.f_locals.get(code.co_varnames[0])
    return value if isinstance(value, type) else type(value)


def place(code: CodeType) -> str:
    """A function's name and where it is written, for messages."""
    return f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
