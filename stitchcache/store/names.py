"""Temporary names that tell who made them, to tell leftovers of the dead from work of the living."""

from __future__ import annotations

import hashlib
import os
import re

_NAME = re.compile(r"(?P<host>[A-Za-z0-9_-]+)\.(?P<pid>[0-9]+)\.[0-9a-f]{16}\.(?P<what>[a-z]+)")


def host_token() -> str:
    """This host, boot and process namespace: where a process number means the same process."""
    node = os.uname().nodename
    digest = hashlib.sha256(node.encode())
    # Containers on one host, and hosts cloned with one name, number their processes separately.
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            if source.endswith("pid"):
                digest.update(os.readlink(source).encode())
            else:
                with open(source, "rb") as file:
                    digest.update(file.read(64))
        except OSError:
            digest.update(b"?")
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", node)[:32] or "host"
    return f"{readable}-{digest.hexdigest()[:12]}"


def temporary_name(host: str, what: str) -> str:
    """A name that no other process or thread makes."""
    return f"{host}.{os.getpid()}.{os.urandom(8).hex()}.{what}"


def is_dead(name: str, host: str) -> bool | None:
    """Whether the maker of a temporary name is gone.

    Returns:
        ``None`` where it cannot be told: another host, or a name that is not ours.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["host"] != host:
        return None
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
