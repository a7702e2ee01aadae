"""Journals: what replicas write down for each other in the quotas' store, bounded in length and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from service.quota_store import Store
from service.watch.evidence import Place

MICROSECONDS = 1_000_000
LONGEST = 4096
"""Entries that one script can read: Lua passes on no more than 8,000 values at once."""
NEVER = 2**53
"""The number of an entry that nothing comes after."""
AT_ONCE = 1024
"""Entries that one script adds, of two values each."""

# A ring in one hash, so one key and one slot of a cluster, by commands that quotas need anyway: field i holds the latest of the
# entries i, i + kept, i + 2 kept, ... A journal that was lost begins another epoch, so that its readers notice.
EXCHANGE = """
-- KEYS: the journal. ARGV: epoch and number of the last entry that is known; entries kept; milliseconds kept; entries to add.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local head = redis.call('HMGET', KEYS[1], 'epoch', 'count')
local epoch, count, kept = head[1], tonumber(head[2] or 0), tonumber(ARGV[3])
local known = tonumber(ARGV[2])
if epoch ~= ARGV[1] and known < 2^53 then
  known = 0
end
local fields, news = {}, {}
for i = math.max(known, count - kept) + 1, count do
  fields[#fields + 1] = i % kept
end
if #fields > 0 then
  news = redis.call('HMGET', KEYS[1], unpack(fields))
end
if #ARGV > 4 then
  epoch = epoch or string.format('%.0f', now)
  local changes = {}
  for i = 5, #ARGV do
    count = count + 1
    changes[#changes + 1] = count % kept
    changes[#changes + 1] = string.format('%.0f', now) .. ':' .. ARGV[i]
  end
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'count', count, unpack(changes))
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return {now, epoch or '', count, news}
"""

DELETE = "redis.call('PEXPIRE', KEYS[1], 0)"


class Entry(NamedTuple):
    """What another replica, or this one, wrote ``age_s`` seconds ago."""

    age_s: float
    is_ours: bool
    data: bytes


class Journal:
    """Journals of one kind.

    Args:
        store: Where they are.
        kept: Entries kept of each, up to :data:`LONGEST`.
        kept_s: Seconds for which a journal is kept after its last entry.
        source: Eight bytes that nobody else writes under.
    """

    def __init__(self, store: Store, kept: int, kept_s: float, source: bytes) -> None:
        self._store = store
        self._kept = min(kept, LONGEST)
        self._kept_ms = max(1, round(1000 * kept_s))
        self._source = source
        self._exchange, self._delete = store.script(EXCHANGE), store.script(DELETE)

    async def exchange(self, key: str, place: Place, entries: Sequence[bytes] = ()) -> list[Entry]:
        """Add entries, in one step with reading what was there before them; returns what was new, the oldest first.

        Several may exchange from the same place at once: each entry is returned to one of them.

        Raises:
            StoreDownError: They may have been added or not.
        """
        found = []
        for start in range(0, max(1, len(entries)), AT_ONCE):
            added = entries[start : start + AT_ONCE]
            now, epoch, count, news = await self._store.run(self._exchange, key, *self._arguments(place, added))
            if epoch != place.epoch:
                place.epoch, place.number = epoch, 0
            first = count - len(added) - len(news) + 1
            found += [self._entry(now, text) for number, text in enumerate(news, first) if text and number > place.number]
            place.number = max(place.number, count)
        return found

    async def add(self, entries: Mapping[str, bytes]) -> None:
        """Add an entry to each of several journals, by their keys, and read nothing; raises :class:`StoreDownError`."""
        nowhere = Place(number=NEVER)
        await self._store.run_all(self._exchange, [(key, self._arguments(nowhere, [entry])) for key, entry in entries.items()])

    async def delete(self, key: str) -> None:
        """Delete a journal; raises :class:`StoreDownError`."""
        await self._store.run(self._delete, key)

    def _arguments(self, place: Place, added: Sequence[bytes]) -> list[str | float | bytes]:
        return [place.epoch, place.number, self._kept, self._kept_ms, *(self._source + entry for entry in added)]

    def _entry(self, now: int, text: bytes) -> Entry:
        at, _, entry = text.partition(b":")
        length = len(self._source)
        age = max(0, now - int(at)) if at.isdigit() else 0
        return Entry(age / MICROSECONDS, entry[:length] == self._source, entry[length:])
