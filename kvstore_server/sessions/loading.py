"""From objects in the store to resident rows. Blocking; every checksum is verified."""

from collections.abc import Iterator

from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_kernels import Signs
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.sessions.cutting import widened
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.segment import Segment, data_loss, no_such_fit
from kvstore_server.storage.session_state import AppendEntry, SessionState


def extend_resident(log: CommitLog, state: SessionState, resident: ResidentSession, end: int) -> None:
    """Reads the objects that `resident` lacks below `end`, in order; DataLoss names the first damaged range.

    An object may hold more than is missing: appends that were loaded before they were merged, or of a parent after the
    fork.
    """
    missing = [entry for entry in log.appends(state) if entry.start < end and entry.end > resident.length]
    for segment, damages in log.inspect_all(state, missing):
        identity, begin = segment.header.identity, segment.header.start
        if segment.header.epoch != resident.epoch_of(begin):
            raise no_such_fit(identity, segment.header.end, segment.header.epoch)
        limit = min(segment.header.end, state.owned_end(identity.session, identity.generation))
        damage = min(damages, key=lambda each: each.token_start, default=None)
        sound = limit if damage is None else min(limit, damage.token_start)
        while sound > (length := resident.length):
            first, last = length - begin, sound - begin
            rows = [
                (rows_between(keys, first, last), rows_between(values, first, last))
                for keys, values in _whole(segment, resident)
            ]
            resident.extend(length, rows, last - first)  # unless another loader has done so meanwhile
        if damage is not None and damage.token_start < min(limit, end):
            raise data_loss(identity, damage)


def _whole(segment: Segment, resident: ResidentSession) -> Iterator[tuple[KindRows, KindRows]]:
    """Keys and values of each layer, laid out as the session's codec has them."""
    (keys_level, values_level), epoch = segment.header.floor, segment.header.epoch
    for layer, (keys, values) in enumerate(zip(segment.keys, segment.values, strict=True)):
        if keys_level or values_level:
            keys = widened(keys, resident.plan_of(layer, "keys", epoch), keys_level)
            values = widened(values, resident.plan_of(layer, "values", epoch), values_level)
        yield keys, values


def read_fit(log: CommitLog, state: SessionState, entry: AppendEntry) -> Fit:
    """The fit that this append made."""
    fit = log.read(state, entry).fit
    assert fit is not None
    return fit


def rows_between(rows: KindRows, start: int, end: int) -> KindRows:
    """Tokens [start, end) of an object."""
    if rows.signs is None:
        return KindRows(rows.rows[start:end], None)
    exact = rows.rows.shape[0]
    first, last = max(0, start - exact), max(0, end - exact)
    signs = Signs(rows.signs.words[first:last], rows.signs.scales[first:last])
    return KindRows(rows.rows[start:end], signs)
