"""From objects in the store to resident rows. Blocking; every checksum is verified."""

from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_kernels import Signs
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.session_state import AppendEntry, SessionState


def extend_resident(log: CommitLog, state: SessionState, resident: ResidentSession, end: int) -> None:
    """Reads the appends that `resident` lacks below `end`, in order; DataLoss names the first damaged range."""
    missing = [entry for entry in log.appends(state) if resident.length <= entry.start < end]
    for entry, segment in zip(missing, log.read_all(state, missing), strict=True):
        kept = entry.end - entry.start
        rows = [
            (shortened(keys, kept), shortened(values, kept))
            for keys, values in zip(segment.keys, segment.values, strict=True)
        ]
        resident.extend(entry.start, rows, kept)


def read_fit(log: CommitLog, state: SessionState, entry: AppendEntry) -> Fit:
    """The means that this append computed."""
    fit = log.read(state, entry).fit
    assert fit is not None
    return fit


def shortened(rows: KindRows, tokens: int) -> KindRows:
    """The first `tokens` tokens: what a fork shares of the append it was cut in."""
    if rows.signs is None:
        return KindRows(rows.rows[:tokens], None)
    sketched = max(0, tokens - rows.rows.shape[0])
    signs = Signs(rows.signs.words[:sketched], rows.signs.scales[:sketched])
    return KindRows(rows.rows[:tokens], signs)
