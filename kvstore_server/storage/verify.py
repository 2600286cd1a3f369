"""Reads a whole store and lists what is damaged. Changes nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore_server.errors import KVStoreError
from kvstore_server.storage.checksums import Damage, whole_damage
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.container import DamagedError
from kvstore_server.storage.keys import (
    is_generation,
    log_folder,
    log_key,
    log_starts,
    merged_folder,
    merged_key,
    meta_folder,
    meta_key,
    meta_seqs,
)
from kvstore_server.storage.meta import Checkpoint, MergedRange, read_record
from kvstore_server.storage.projections import FOLDER, ProjectionStore
from kvstore_server.storage.segment import inspect_segment
from kvstore_server.storage.segment_header import Identity
from kvstore_server.storage.store import ObjectStore


@dataclass(frozen=True)
class DamagedRange:
    """Positions of one session that cannot be served; without `damage`, `what` names what else is wrong with it."""

    tenant: str
    session: str
    generation: str
    what: str
    damage: Damage | None = None

    def __str__(self) -> str:
        place = f"{self.tenant}/{self.session}"
        if self.damage is None:
            return f"{place}: {self.what}"
        layer = "" if self.damage.layer is None else f" layer {self.damage.layer}"
        kind = "" if self.damage.kind is None else f" {self.damage.kind}"
        positions = f"[{self.damage.token_start}, {self.damage.token_end})"
        return f"{place} generation {self.generation} positions {positions}{layer}{kind}: {self.what}"


@dataclass
class Report:
    """What was read so far and what was found."""

    sessions: int = 0
    sessions_total: int = 0
    records: int = 0
    segments: int = 0
    bytes: int = 0
    damaged: list[DamagedRange] = field(default_factory=list)


def verify_store(store: ObjectStore, progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Checks records, chains of appends and every byte of segments and projections; `progress` is told of each object.

    Deleted generations are read too, as far as they are there: forks may share them.
    """
    report = Report()
    names = [
        (tenant, session)
        for tenant in store.list_folders("")
        if not tenant.startswith("_")
        for session in store.list_folders(tenant)
    ]
    report.sessions_total = len(names)
    for tenant, session in names:
        _SessionCheck(store, tenant, session, report, progress).run()
        report.sessions += 1
        progress(report)
    _check_projections(ProjectionStore(store), report)
    return report


def _check_projections(projections: ProjectionStore, report: Report) -> None:
    for sha256 in projections.names():
        report.bytes += projections.size(sha256)
        try:
            projections.load(sha256)
        except KVStoreError as error:
            report.damaged.append(DamagedRange(FOLDER, sha256, "", str(error)))


class _SessionCheck:
    def __init__(
        self, store: ObjectStore, tenant: str, session: str, report: Report, progress: Callable[[Report], None]
    ) -> None:
        self._store, self._tenant, self._session = store, tenant, session
        self._report, self._progress = report, progress
        self._damaged_keys: set[str] = set()
        self._merged: dict[str, MergedRange] = {}

    def run(self) -> None:
        self._check_records()
        for generation in self._store.list_folders(f"{self._tenant}/{self._session}"):
            if is_generation(generation):
                self._check_objects(generation)
        self._check_chain()

    def _check_records(self) -> None:
        seqs = meta_seqs(self._store.list_keys(meta_folder(self._tenant, self._session)))
        for seq in range(seqs[0], seqs[-1] + 1) if seqs else ():
            try:
                data = self._store.get(meta_key(self._tenant, self._session, seq))
                record = read_record(data, self._tenant, self._session, seq)
                if isinstance(record, Checkpoint):
                    place = self._tenant, self._session, record.generation
                    self._merged |= {merged_key(*place, each.name): each for each in record.merged}
            except KeyError:
                self._add("", f"meta record {seq} is missing", None)
            except KVStoreError as error:
                self._add("", str(error), None)
            self._report.records += 1
            self._progress(self._report)

    def _check_objects(self, generation: str) -> None:
        place = self._tenant, self._session, generation
        starts = log_starts(self._store.list_keys(log_folder(*place)))
        for start, following in zip(starts, [*starts[1:], None], strict=False):
            end = start + 1 if following is None else following
            self._check_object(log_key(*place, start), Identity(*place, start), end)
        for key in self._store.list_keys(merged_folder(*place)):
            if merged := self._merged.get(key):  # all others are of mergers that died, or are at work
                self._check_object(key, Identity(*place, merged.start), merged.end, merged.digest)

    def _check_object(self, key: str, identity: Identity, end: int, digest: str = "") -> None:
        try:
            data = self._store.get(key)
            self._report.bytes += len(data)
            segment, found = inspect_segment(data, identity)
            if digest and (segment.header.end, segment.header.digest) != (end, digest):
                raise DamagedError("another object")
        except (KVStoreError, DamagedError, KeyError) as error:
            what = "missing" if isinstance(error, KeyError) else str(error)
            found = [whole_damage(identity.start, end, what)]
        for damage in found:
            self._damaged_keys.add(key)
            self._add(identity.generation, damage.what, damage)
        self._report.segments += 1
        self._progress(self._report)

    def _check_chain(self) -> None:
        """That the living generation's appends, shared ones included, follow each other without holes."""
        log = CommitLog(self._store, self._tenant)
        try:
            state = log.load(self._session)
        except KVStoreError:
            return  # one of its records: named already
        if state is None:
            return
        try:
            for entry in log.appends(state):
                if entry.damage and entry.key not in self._damaged_keys:
                    damage = whole_damage(entry.start, entry.end, entry.damage)
                    self._add(entry.generation, f"{entry.damage} ({entry.key})", damage)
        except KVStoreError as error:
            self._add(state.generation, str(error), None)

    def _add(self, generation: str, what: str, damage: Damage | None) -> None:
        self._report.damaged.append(DamagedRange(self._tenant, self._session, generation, what, damage))
