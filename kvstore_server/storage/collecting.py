"""Removes what ended generations left, once no fork can share it any more, and what was merged (docs/format.md)."""

from collections.abc import Callable

from kvstore_server.storage.keys import (
    is_generation,
    log_folder,
    log_starts,
    merged_folder,
    merged_key,
    merged_seqs,
    refs_folder,
)
from kvstore_server.storage.meta_log import MetaLog
from kvstore_server.storage.session_state import range_at
from kvstore_server.storage.store import ObjectStore


class Collector:
    """The garbage of one tenant. Blocking.

    A generation that ended at least `grace_seconds` ago, by the clock of the record that ended it, is removed unless a
    fork refers to it: a living one, or one that ended more recently and may still be read. Of all others those objects
    are removed that no checkpoint of the last `grace_seconds` needs.
    """

    def __init__(self, store: ObjectStore, tenant: str, grace_seconds: float, clock: Callable[[], float]) -> None:
        self._store, self._tenant = store, tenant
        self._grace_seconds, self._clock = grace_seconds, clock
        self._meta = MetaLog(store, tenant, clock)

    def collect(self, session: str) -> int:
        """Removes what may go of the generations of that name; how many objects."""
        folders = self._store.list_folders(f"{self._tenant}/{session}")
        generations = [name for name in folders if is_generation(name)]
        return sum(self._collect(session, generation) for generation in generations)

    def _collect(self, session: str, generation: str) -> int:
        place = self._tenant, session, generation
        refs: list[str] = []
        if over := self._is_over(session, generation):
            refs = self._store.list_keys(refs_folder(*place))  # only after its end was read
            over = not any(self._may_share(session, generation, *ref.split("/")[-2:]) for ref in refs)
        if over:
            garbage = self._store.list_keys(log_folder(*place)) + self._store.list_keys(merged_folder(*place)) + refs
        else:
            garbage = self._replaced(session, generation)
        for key in garbage:
            self._store.delete(key)
        return len(garbage)

    def _replaced(self, session: str, generation: str) -> list[str]:
        """What nobody reads who has looked at the records since the newest checkpoint that is old enough.

        Log names within its ranges, where late writers may have put something since, and merged objects of its time
        that it does not name. Of later ones nothing is known yet.
        """
        place = self._tenant, session, generation
        before = self._clock() - self._grace_seconds
        records = self._meta.checkpoints(session, generation)
        settled = next((each for each in records if each.created_unix_seconds <= before), None)
        if settled is None:
            return []
        logs, merged = self._store.list_keys(log_folder(*place)), self._store.list_keys(merged_folder(*place))
        named = {merged_key(*place, each.name) for each in settled.merged}
        garbage = [key for key in logs for start in log_starts([key]) if range_at(settled.merged, start)]
        garbage += [key for key in merged for seq in merged_seqs([key]) if seq <= settled.seq and key not in named]
        return garbage

    def _is_over(self, session: str, generation: str) -> bool:
        """Whether it ended so long ago that nobody may read it, not even by its generation."""
        ended = self._meta.ended_unix_seconds(session, generation)
        return ended is not None and ended + self._grace_seconds <= self._clock()

    def _may_share(self, session: str, generation: str, child: str, child_generation: str) -> bool:
        """Whether a fork that referred to the generation reads it, or could come to.

        A reference without its fork is of a writer that died, or that will put its fork's record in a moment. Which one
        is settled here: whoever takes the number of that record first. The writer that loses looks at its parent again.
        """
        if not is_generation(child_generation) or self._meta.settle_absent(child, child_generation):
            return False
        return not self._is_over(child, child_generation) and self._meta.shares(
            child, child_generation, session, generation
        )
