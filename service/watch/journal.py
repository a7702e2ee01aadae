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
# entries i, i + kept, i + 2 kept, ... A journal that was lost begins another epoch, so that its readers notice. So does one
# that a store brings back from an earlier copy of itself: it ends before the entry that a reader knows, or has a later one.
EXCHANGE = """
-- KEYS: the journal. ARGV: epoch and number of the last entry that is known, and when it was read; entries kept; milliseconds
-- kept; entries to add.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local head = redis.call('HMGET', KEYS[1], 'epoch', 'count')
local epoch, count, kept = head[1], tonumber(head[2] or 0), tonumber(ARGV[4])
local known, read = tonumber(ARGV[2]), tonumber(ARGV[3])
local is_older = false
if known < 2^53 then
  if epoch == ARGV[1] and known > 0 then
    is_older = known > count
    if not is_older and count - known < kept then
      local last = redis.call('HGET', KEYS[1], known % kept)
      is_older = (tonumber(string.match(last or '', '^%d+')) or 0) > read
    end
  end
  if is_older or epoch ~= ARGV[1] then
    known = 0
  end
end
local fields, news = {}, {}
for i = math.max(known, count - kept) + 1, count do
  fields[#fields + 1] = i % kept
end
if #fields > 0 then
  news = redis.call('HMGET', KEYS[1], unpack(fields))
end
if is_older or #ARGV > 5 then
  epoch = not is_older and epoch or string.format('%.0f', now)
  local changes = {}
  for i = 6, #ARGV do
    count = count + 1
    changes[#changes + 1] = count % kept
    changes[#changes + 1] = string.format('%.0f', now) .. ':' .. ARGV[i]
  end
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'count', count, unpack(changes))
  redis.call('PEXPIRE', KEYS[1], ARGV[5])
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

        Several may exchange from the same place at once: each entry is returned to one of them. A journal of another epoch is
        read from its beginning, but what was written before this reader read last is no news to it.

        Raises:
            StoreDownError: They may have been added or not.
        """
        found = []
        for start in range(0, max(1, len(entries)), AT_ONCE):
            added = entries[start : start + AT_ONCE]
            now, epoch, count, news = await self._store.run_apart(self._exchange, key, *self._arguments(place, added))
            read_at = 0
            if epoch != place.epoch:
                place.epoch, place.number, read_at = epoch, 0, place.read_at
            first = count - len(added) - len(news) + 1
            unread = [text for number, text in enumerate(news, first) if text and number > place.number]
            found += [self._entry(now, text) for text in unread if _written_at(text) >= read_at]
            place.number, place.read_at = max(place.number, count), max(place.read_at, now)
        return found

    async def add(self, entries: Mapping[str, bytes]) -> None:
        """Add an entry to each of several journals, by their keys, and read nothing; raises :class:`StoreDownError`."""
        nowhere = Place(number=NEVER)
        await self._store.run_all(self._exchange, [(key, self._arguments(nowhere, [entry])) for key, entry in entries.items()])

    async def delete(self, key: str) -> None:
        """Delete a journal; raises :class:`StoreDownError`."""
        await self._store.run_apart(self._delete, key)

    def _arguments(self, place: Place, added: Sequence[bytes]) -> list[str | float | bytes]:
        return [place.epoch, place.number, place.read_at, self._kept, self._kept_ms, *(self._source + entry for entry in added)]

    def _entry(self, now: int, text: bytes) -> Entry:
        _, _, entry = text.partition(b":")
        length, age = len(self._source), max(0, now - _written_at(text))
        return Entry(age / MICROSECONDS, entry[:length] == self._source, entry[length:])


def _written_at(text: bytes) -> int:
    """Return the store's time of an entry in microseconds; 0 for what is none."""
    at = text.partition(b":")[0]
    return int(at) if at.isdigit() else 0
