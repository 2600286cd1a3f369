"""A TCP proxy on loopback that loses connections when it is told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Proxy:
    """Between one client and one server."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._deaf = False
        self.target = ""
        self.connections = self.cuts = 0

    def lose_answers(self) -> None:
        """From now on the server hears the client and not the other way round, until the connection is cut."""
        self._deaf = True

    def cut(self) -> None:
        """Resets every connection; new ones are whole again."""
        self._deaf = False
        self.cuts += bool(self._writers)
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.connections += 1
        server, to_server = await asyncio.open_connection(self._host, int(self._port))
        self._writers |= {to_client, to_server}
        tasks = {
            asyncio.create_task(self._forward(client, to_server, answers=False)),
            asyncio.create_task(self._forward(server, to_client, answers=True)),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for writer in (to_client, to_server):
                writer.transport.abort()
                self._writers.discard(writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if not (answers and self._deaf):
                    writer.write(data)
                    await writer.drain()


@asynccontextmanager
async def proxied(target: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
