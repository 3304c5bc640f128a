"""Pruning a remote: over a quota or an age the oldest entries go, and then what no entry needs.

No object can be locked, so it is safe by times and by a notice that a prune is under way:

- All ages are by the store's own clock, and nothing goes that was put within the last day.
- An upload relies on a blob that it finds for some hours after the blob was put, and puts an older one again.
  Then it looks that no prune is under way, and after that, that the blob is there. So no prune that saw the
  blob older is still to come to it, and the next one finds it young (see ``Tier.send``).
- What leads somewhere goes before what it leads to. Where something cannot be removed, nothing after it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from stitchcache.artifact.entry import Header, decode_header
from stitchcache.errors import OptionError, StoreError
from stitchcache.remote import AT_ONCE, GRACE, LEASES, NOTICE_LASTS, NOTICES, Remote, elapsed, put_at
from stitchcache.remote.tier import MOST_BYTES, Tier, object_name
from stitchcache.store import Area, key_of
from stitchcache.store.evict import Look, PrunePlan, PruneResult, plan_prune
from stitchcache.store.root import Item

T = TypeVar("T")

# Removed under one renewal of the notice.
_BATCH = 500


@contextmanager
def planned(tier: Tier, *, dry_run: bool, **limits: Any) -> Iterator[PrunePlan]:
    """What a prune would remove; within the block ``execute()`` does it, unless it is a ``dry_run``.

    Limits are as for :meth:`stitchcache.Cache.plan_prune`; ages count from the upload.

    Raises:
        OptionError: It is a registry.
        StoreError: The remote does not answer, or another prune is under way; nothing was removed.
    """
    if tier.remote.registry:
        said = f"{tier.remote.url}: a registry keeps what a tag needs: set its own rules for old tags"
        raise OptionError(said, option="--remote")
    # A request that is sent again might remove what was put since.
    remote = Remote(tier.remote.url, lambda *_: None, retries=0)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        look = _Look(remote, pool)
        try:
            look.see(time.time() if dry_run else look.begin())
            yield plan_prune(look, **limits)
        finally:
            if not dry_run and not look.unsure:
                remote.now(remote.ask, "delete", look.notice)


class _Look(Look):
    since = "uploaded"

    def __init__(self, remote: Remote, pool: ThreadPoolExecutor) -> None:
        self.notice = f"{NOTICES}/{os.urandom(8).hex()}"
        self.unsure = False  # whether a removal may still be on its way
        self._remote, self._pool, self._renewed = remote, pool, 0.0

    def begin(self) -> float:
        """Put the notice, and see that there is no other; the store's time."""
        self._renew()
        times = {item.path: item.modified / 1e9 for item in self._listed(NOTICES)}
        now = max(times.values(), default=0.0)
        for path, since in times.items():
            if path != self.notice and now - since < NOTICE_LASTS:
                said = f"another prune is under way, or ended early {(now - since) / 60:.0f} minutes ago"
                raise StoreError(f"{self._remote.url}: {said}: nothing was removed", path=path)
        return now

    def _renew(self) -> None:
        self._renewed = elapsed()
        self._remote.now(self._remote.write, self.notice, b"a prune is under way", replace=True)

    def see(self, now: float) -> None:
        super().__init__((), GRACE, now)
        self.may_go = list(filter(self.is_old, self.entries))
        # An upload may rely on the young blobs of an entry that goes.
        self._ever_named.clear()

    def _listed(self, area: str) -> Iterator[Item]:
        for each in self._remote.now(self._remote.listed, area) or ():
            yield Item(each["path"], "", each["size"], int(put_at(each) * 1e9))

    def items(self, area: Area) -> Iterable[Item]:
        for item in self._listed(area):
            key = key_of(area, item.path.rpartition("/")[2])
            if key is not None and object_name(area, key) == item.path:
                yield replace(item, key=key)

    def each(self, ask: Callable[[Item], T], items: Sequence[Item]) -> Iterable[T]:
        return self._pool.map(ask, items)

    def header(self, item: Item) -> Header | None:
        data = self.read(item, Area.ENTRIES) or b""
        return decode_header(data, len(data), path=item.path)

    def read(self, item: Item, area: Area) -> bytes | None:
        return self._remote.now(self._remote.read, item.path, MOST_BYTES)

    def leftovers(self) -> tuple[Item, ...]:
        return tuple(item for area in (NOTICES, LEASES) for item in self._listed(area) if self.is_old(item))

    def remove(self, plan: PrunePlan) -> PruneResult:
        if not self._renewed:
            raise StoreError(f"{self._remote.url}: this was a look: nothing is removed", path="")
        result, self.unsure = PruneResult(), True
        entries = tuple(item for item, _ in plan.entries)
        for group in (plan.targets, entries, plan.pieces, plan.blobs, plan.leftovers):
            for begin in range(0, 0 if result.failed else len(group), _BATCH):
                self._renew()
                some = group[begin : begin + _BATCH]
                for item, failure in zip(some, self._pool.map(self._delete, some), strict=True):
                    if failure:
                        result.failed.append((self._remote.at(item.path), failure))
                        continue
                    result.files += 1
                    result.bytes += item.size
                    result.entries += [item.key] if group is entries else []
        self.unsure = bool(result.failed)
        return result

    def _delete(self, item: Item) -> str:
        """Remove an object; why it could not be."""
        try:
            if elapsed() - self._renewed > NOTICE_LASTS / 4:
                return "the prune was held up; the next one removes it"
            self._remote.now(self._remote.ask, "delete", item.path)
        except StoreError as error:
            return error.message
        return ""
