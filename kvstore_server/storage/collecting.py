"""Removes what ended generations left, once no fork can share it any more (docs/format.md, section 5)."""

from collections.abc import Callable

from kvstore_server.storage.keys import is_generation, log_folder, refs_folder
from kvstore_server.storage.meta_log import MetaLog
from kvstore_server.storage.store import ObjectStore


class Collector:
    """The garbage of one tenant. Blocking.

    A generation that ended at least `grace_seconds` ago, by the clock of the record that ended it, is removed unless a
    fork refers to it: a living one, or one that ended more recently and may still be read.
    """

    def __init__(self, store: ObjectStore, tenant: str, grace_seconds: float, clock: Callable[[], float]) -> None:
        self._store, self._tenant = store, tenant
        self._grace_seconds, self._clock = grace_seconds, clock
        self._meta = MetaLog(store, tenant, clock)

    def collect(self, session: str) -> int:
        """Removes what may go of the earlier generations of that name; how many objects."""
        folders = self._store.list_folders(f"{self._tenant}/{session}")
        generations = [name for name in folders if is_generation(name)]
        return sum(self._collect(session, generation) for generation in generations)

    def _collect(self, session: str, generation: str) -> int:
        if not self._is_over(session, generation):
            return 0
        refs = self._store.list_keys(refs_folder(self._tenant, session, generation))  # only after its end was read
        if any(self._may_share(session, generation, *ref.split("/")[-2:]) for ref in refs):
            return 0
        garbage = self._store.list_keys(log_folder(self._tenant, session, generation)) + refs
        for key in garbage:
            self._store.delete(key)
        return len(garbage)

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
