"""Why a file or directory is not trusted, in words; what is seldom asked."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


def refusal(path: str, facts: os.stat_result, *, above: bool) -> str | None:
    """Why a file or directory is not trusted, as ``store.distrust`` tells; ``None`` if it is after all."""
    mode = facts.st_mode
    if facts.st_uid not in (os.geteuid(), 0):
        return (
            f"{path} belongs to user {facts.st_uid}, and this process runs as {os.geteuid()}: "
            "whoever owns it could run code here; copy the cache, or chown it"
        )
    if stat.S_ISLNK(mode):
        return f"{path} is a symbolic link: put what it leads to in its place"
    if stat.S_ISREG(mode) and facts.st_nlink > 1:
        return (
            f"{path} has {facts.st_nlink} names (hard links), so it may be a file of another place: "
            "put a copy in its place, or remove it"
        )
    listed = False
    # There may be none, or the system has none.
    with suppress(OSError, AttributeError):
        listed = bool(os.getxattr(path, "system.posix_acl_access"))
    if above and not mode & stat.S_IWOTH and not listed and _is_own(facts.st_gid):
        return None
    shown, mend = f"mode {stat.S_IMODE(mode):04o}", f"chmod go-w {path!r}"
    if listed:
        shown, mend = f"{shown} and an access list (see getfacl)", f"setfacl -b {path!r}; {mend}"
    return f"{path} has {shown}, so that others can write it and run code here: {mend} after checking who did"


def _is_own(gid: int) -> bool:
    """Whether a group is the private one of this process's user, as most distributions give to each user.

    There, with a umask of 002, most directories of a user can be written by that group.
    """
    # Few directories above a root can be written by a group.
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    own = gid == user.pw_gid != 0 and group.gr_name == user.pw_name
    return own and set(group.gr_mem) <= {user.pw_name}
