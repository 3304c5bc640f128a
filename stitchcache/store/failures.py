"""What a failed system call means for the user, and what to do about it."""

from __future__ import annotations

import errno
import os

from stitchcache.errors import StoreWriteError

_ELSEWHERE = "or set STITCHCACHE_DIR to another directory"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: free space (`stitchcache prune`), {_ELSEWHERE}",
    errno.EDQUOT: f"the quota is used up: free space (`stitchcache prune`), {_ELSEWHERE}",
    errno.EROFS: f"the file system is read-only: use it as a lower layer, {_ELSEWHERE}",
    errno.EACCES: f"permission is denied: check who owns it, {_ELSEWHERE}",
    errno.EPERM: f"permission is denied: check who owns it, {_ELSEWHERE}",
    errno.EMFILE: "this process has too many open files: raise `ulimit -n`",
    errno.ENFILE: "the system has too many open files: raise fs.file-max",
    errno.ENOTDIR: f"a file stands where a directory should be: move it away, {_ELSEWHERE}",
    errno.ESTALE: f"the network file system lost the file: try again, {_ELSEWHERE}",
    errno.EIO: f"the device reports an error: look at the system's log, {_ELSEWHERE}",
}


def words(error: OSError) -> str:
    """The operating system's words for an error."""
    return os.strerror(error.errno) if error.errno else str(error)


def write_error(error: OSError, path: str) -> StoreWriteError:
    """The store's error for a write that failed.

    Args:
        error: What the system said.
        path: What was to be written, where the error does not say.
    """
    where = error.filename if isinstance(error.filename, str) else path
    advice = _ADVICE.get(error.errno or 0, "`stitchcache doctor` tries what the directory can do")
    return StoreWriteError(
        f"{where}: cannot be written ({words(error)}): {advice}", path=where, reason=words(error)
    )
