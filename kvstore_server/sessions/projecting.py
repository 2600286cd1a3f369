"""Projections: kept, given back, listed, and found for the sessions that name them."""

import asyncio
import re
from dataclasses import dataclass

from kvstore_codecs.artifact import Projection
from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_server.errors import FailedPrecondition, InvalidArgument, NotFound
from kvstore_server.limits import Limits
from kvstore_server.storage.projections import ProjectionStore
from kvstore_server.storage.store import Buffer, ObjectStore

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class ProjectionInfo:
    """What is said of a stored projection; of a damaged one no more than its name and size."""

    sha256: str
    size: int
    model_fingerprint: str
    header_json: str


class Projecting:
    def __init__(self, store: ObjectStore, limits: Limits) -> None:
        self._files, self._limits = ProjectionStore(store), limits

    async def put(self, data: Buffer) -> tuple[str, bool]:
        """The file's sha256 and whether it was there already; InvalidArgument if it is no sound projection."""
        try:
            projection, present = await asyncio.to_thread(self._files.put, data)
        except ValueError as error:
            raise InvalidArgument("data", str(error)) from None
        return projection.sha256, present

    async def get(self, sha256: str) -> memoryview:
        """The file. InvalidArgument, NotFound."""
        return memoryview(await asyncio.to_thread(self._files.get, _checked(sha256)))

    async def page(self, page_size: int, page_token: str) -> tuple[list[ProjectionInfo], str]:
        """Projections in order of their hashes from `page_token` on, and the next token, empty at the end."""
        limit = self._limits.list_page_max
        if page_size > limit:
            raise InvalidArgument("page_size", f"{page_size} is more than {limit}", limit=limit)
        size = page_size or limit
        start = _checked(page_token, "page_token") if page_token else ""
        names = await asyncio.to_thread(self._files.names, start, size)
        infos = [await asyncio.to_thread(self._info, name) for name in names]
        return infos, names[-1] if len(names) == size else ""

    async def of(self, spec: CodecSpec, shape: ModelShape) -> tuple[Projection, ...]:
        """The projections that a codec names; FailedPrecondition unless all are here and made for that model."""
        try:
            found = [await asyncio.to_thread(self._files.load, sha256) for sha256 in spec.projections]
            for projection in found:
                projection.check_serves(spec, shape)
        except NotFound as error:
            raise FailedPrecondition("NO_PROJECTION", str(error)) from None
        except ValueError as error:
            raise FailedPrecondition("PROJECTION_DIFFERS", str(error)) from None
        return tuple(found)

    def _info(self, sha256: str) -> ProjectionInfo:
        size, header = self._files.size(sha256), self._files.header(sha256)
        if header is None:
            return ProjectionInfo(sha256, size, "", "")
        return ProjectionInfo(sha256, size, header.model_fingerprint, header.model_dump_json())


def _checked(sha256: str, field: str = "sha256") -> str:
    if not _SHA256.fullmatch(sha256):
        raise InvalidArgument(field, "must be 64 hexadecimal digits")
    return sha256
