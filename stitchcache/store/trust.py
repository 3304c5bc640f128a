"""Whose files may be run. What an entry holds is code: a file that others can write is as good as theirs."""

from __future__ import annotations

import os
import stat

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: str, facts: os.stat_result) -> str | None:
    """Why a file or directory is not trusted; ``None`` when it is.

    Args:
        path: What it is about, for the message.
        facts: Its ``stat``.
    """
    # Ownership by root is no weaker: root can do anything to the process anyway.
    if facts.st_uid not in (os.geteuid(), 0):
        return (
            f"{path} belongs to user {facts.st_uid}, and this process runs as {os.geteuid()}: "
            "whoever owns it could run code here; copy the cache, or chown it"
        )
    if facts.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(facts.st_mode)
        return (
            f"{path} has mode {mode:04o}, so that others can write it and run code here: "
            f"chmod go-w {path!r} after checking who did"
        )
    return None
