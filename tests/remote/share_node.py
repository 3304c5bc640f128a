"""A node that compiles without torch: ``python share_node.py JSON``. It may be killed at any request."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "store"), str(Path(__file__).parents[2])]


def main(job: dict) -> None:
    from stores import artifact, key, target

    from stitchcache import remote
    from stitchcache.cache import Cache

    remote.LIFETIME = job["lifetime"]
    own_time = time.time
    time.time = lambda: own_time() + job.get("clock", 0)
    ask, count = remote.Remote.ask, 0

    def counted(self, verb, *args, **how):
        nonlocal count
        count += 1
        if count == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(self, verb, *args, **how)

    remote.Remote.ask = counted
    began = time.monotonic()
    cache = Cache(job["root"], remote=job["remote"])
    led = cache.tier.records(cache, key("t"))
    made = cache.get(key("a")) or cache.tier.entry(cache, key("a"))
    compiled = []
    if made is None:
        names = {key(f"piece {n}"): n for n in range(3)}
        refs = {}

        def found(each: str) -> bool:
            record = cache.get_piece(each)
            if record is not None:
                refs[each] = record.blob
            return record is not None

        with cache.tier.share(cache, list(names), found, lambda: None) as batches:
            for each in (each for batch in batches for each in batch):
                time.sleep(0.05)
                compiled.append(names[each])
                refs[each] = cache.put_blob(f"piece {names[each]}".encode() * 1000)
                cache.put_piece(each, "aoti", refs[each])
        cache.put(artifact("a", [refs[each] for each in names]))
    if not led:
        # After a graph hit too, so that the next start is a direct hit.
        cache.put_target(key("t"), target(key("a")))
    report = {"compiled": compiled, "seconds": time.monotonic() - began, "asked": count}
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
