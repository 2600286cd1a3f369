"""What this project writes itself, small: where fuzzing starts from."""

import torch

from kvstore_codecs.artifact import ProjectionHeader, write_projection
from kvstore_codecs.spec import DEFAULT, KINDS, RAW, Affine, CodecSpec, LayerOverride, Matryoshka, Qjl, Rotated
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.identity.api_keys import KeyRecord, write_key_record
from kvstore_server.metadata.index import Notice, PrefixEntry, ReplicaEntry, SessionEntry
from kvstore_server.storage.merged_segment import merged_segment
from kvstore_server.storage.meta import (
    Ancestor,
    Attributes,
    Checkpoint,
    Create,
    Delete,
    Expire,
    MergedRange,
    Record,
    write_record,
)
from kvstore_server.storage.segment import Segment, write_segment

from ...storage.inputs import SHAPE, SPEC, commit_log, created, next_segment, object_bytes, random_fit
from ...storage.memory_store import MemoryStore
from .parsers import KEY_ID, STEP
from .requests import append

CODECS = (
    RAW,
    DEFAULT,
    CodecSpec(
        keys=Qjl(outlier_channels=(1, 5)),
        values=Affine(planes=3),
        overrides=(LayerOverride(layers=(0, -1) * 16, keys=Rotated(basis="haar")),),
    ),
    CodecSpec(keys=Matryoshka(), values=Matryoshka(basis="projection:" + "0" * 64), fit_tokens=512),
)


def _objects() -> list[bytes]:
    log = commit_log(MemoryStore())
    state = created(log)
    first = next_segment(log, state, 3, exact=1, fit=random_fit(SHAPE, bases=(1, 1)), block_hashes=(b"\7" * 32,))
    segments: list[Segment] = [next_segment(log, state, 2), first]
    segments.append(merged_segment([first, next_segment(log, state, 2, start=3)], 5.0))
    return [object_bytes(write_segment(each)) for each in segments]


def _records() -> list[bytes]:
    facts = {"tenant": "default", "session": "a", "seq": 0, "writer": "w", "created_unix_seconds": 5.0}
    living = {"generation": "000000000000", "ttl_seconds": 9.0, "pinned": False}
    merged = MergedRange(start=0, end=9, name="000000000000-0", digest="0" * 64, stored_bytes=7)
    ancestors = (Ancestor(session="b", generation="000000000000", end=4),)
    records: list[Record] = [
        Create(**facts, spec=SPEC, shape=SHAPE, ttl_seconds=None, pinned=False, ancestors=ancestors),
        Attributes(**facts, **living),
        Delete(**facts, generation="000000000000"),
        Expire(**facts, generation="000000000000"),
        Checkpoint(**facts, **living, merged=(merged,)),
    ]
    return [write_record(each) for each in records]


def _projection() -> bytes:
    header = ProjectionHeader(
        model_fingerprint="m",
        layers=1,
        kv_heads=1,
        head_dim=32,
        metric="none",
        max_position=8,
        calibration_tokens=9,
        calibration_length=9,
        budgets=(2.0,),
        shares=(0.5,),
        measured={"kl": 0.5},
    )
    parts = {}
    for kind in KINDS:
        parts[f"{kind}.basis"] = torch.eye(32).view(1, 1, 32, 32)
        parts[f"{kind}.weights"] = torch.arange(32, 0, -1).float().view(1, 1, 32)
        parts[f"{kind}.mean"] = torch.zeros(1, 1, 32)
    parts["words.2"] = torch.full((2, 1, 1), 2, dtype=torch.int32)
    parts["ranks.0.5"] = torch.full((2, 1, 1), 16, dtype=torch.int32)
    return write_projection(header, parts)


def _index_values() -> list[bytes]:
    entry = SessionEntry(
        tenant="default",
        name="a",
        generation="0",
        length=3,
        stored_bytes=4,
        raw_bytes=5,
        ttl_seconds=None,
        pinned=False,
        model_fingerprint="",
        created_unix_seconds=1.0,
        last_used_unix_seconds=2.0,
    )
    replica = ReplicaEntry(name="host:1", version="0", device="cpu", state="serving", seen_unix_seconds=1.0)
    values = {
        "S": entry.model_dump_json() + "\n3.5",
        "P": PrefixEntry(session="a", generation="0", end=3).model_dump_json(),
        "R": replica.model_dump_json(),
        "N": Notice(tenant="default", session="a", generation="0", length=3).model_dump_json(),
    }
    found = [f"{kind}{value}".encode() for kind, value in values.items()]
    return [*found, found[0] + b" is no number"]


def _key_record() -> bytes:
    record = KeyRecord(
        id=KEY_ID,
        tenant="acme",
        role="writer",
        label="l",
        created_unix_seconds=1.0,
        expires_unix_seconds=None,
        verifier="0" * 64,
    )
    return write_key_record(record)


def seeds_of(parser: str) -> list[bytes]:
    """Of one of PARSERS."""
    if parser in ("object", "object, sealed"):
        return _objects()
    if parser == "commit log":
        strange = [
            _records()[0].replace(b'"generation":"0', b'"generation":"p'),
            _records()[0].replace(b'"b"', b'"../b"'),
        ]
        return [*(b"R" + each for each in (*_records(), *strange)), *(b"S" + each for each in _objects())]
    if parser == "Append message":
        other = pb.AppendRequest(frame=pb.AppendFrame(layer=1, data=b"x" * 9)).SerializeToString() + b"\xf8\x7f\x01"
        return [*(each.SerializeToString() for each in append("plain.0", 0, 1, 1)), other]
    if parser == "Attend message":
        return [STEP.SerializeToString()]
    made = {"projection": lambda: [_projection()], "API key record": lambda: [_key_record()]}
    made |= {"record": _records, "index value": _index_values}
    made["codec"] = lambda: [each.model_dump_json().encode() for each in CODECS]
    return made[parser]()
