"""Plans that were made lately, within bounds of bytes and number: those of sessions with their own bases are large."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

from kvstore_codecs.plan import CodecPlan


class KeptPlans:
    """The most recently used plans: at most `plans_max`, with matrices of `bytes_max` together, or just the newest."""

    def __init__(self, bytes_max: int, plans_max: int) -> None:
        self._bytes_max, self._plans_max = bytes_max, plans_max
        self._plans = OrderedDict[Hashable, CodecPlan]()
        self._lock = Lock()
        self.bytes = 0

    def get(self, key: Hashable, make: Callable[[], CodecPlan]) -> CodecPlan:
        """The plan of `key`. Two threads that make it at once get the same one."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        made = make()
        with self._lock:
            if key not in self._plans:
                self._plans[key] = made
                self.bytes += made.matrix_bytes
            found = self._plans[key]
            while len(self._plans) > 1 and (self.bytes > self._bytes_max or len(self._plans) > self._plans_max):
                self.bytes -= self._plans.popitem(last=False)[1].matrix_bytes
            return found

    def clear(self) -> None:
        """Every plan is made anew."""
        with self._lock:
            self._plans.clear()
            self.bytes = 0
