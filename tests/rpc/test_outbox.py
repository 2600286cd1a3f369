"""What a client of a stream is sent: in its order, each place given back once, and never to one that does not read."""

import asyncio
import time

import pytest

from kvstore_server.rpc.outbox import Outbox


class Client:
    """Takes messages while it reads."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.sent: list[object] = []

    async def write(self, message: object) -> None:
        self.sent.append(message)
        await self.reads.wait()


def outbox_of(client: Client, taken: list[int | None], good: bool = True) -> Outbox:
    def check() -> None:
        if not good:
            raise PermissionError("revoked")

    outbox = Outbox(client.write, check, 0.1, lambda: TimeoutError("too slow"))
    outbox.taken = taken.append
    return outbox


async def test_messages_are_taken_in_their_order_and_flushed() -> None:
    client, taken = Client(), list[int | None]()
    outbox = outbox_of(client, taken)
    for size in (1, 2, 3):
        outbox.put(bytes(size), size)
    await outbox.flush()
    assert (client.sent, taken, len(outbox)) == ([bytes(1), bytes(2), bytes(3)], [1, 2, 3], 0)
    outbox.close()


async def test_a_client_that_does_not_read_ends_it_and_every_place_is_given_back_once() -> None:
    client, taken = Client(), list[int | None]()
    outbox = outbox_of(client, taken)
    outbox.put(b"read", 1)
    await outbox.flush()
    client.reads.clear()
    for size in (2, 3):
        outbox.put(b"not read", size)
    with pytest.raises(TimeoutError, match="too slow"):
        await asyncio.wait_for(asyncio.shield(outbox.ended), 5)
    await outbox.flush()
    outbox.close()
    await asyncio.sleep(0)
    assert sorted(map(int, filter(None, taken))) == [1, 2, 3]


async def test_a_client_is_not_slow_for_what_was_not_written_yet() -> None:
    client, taken = Client(), list[int | None]()
    outbox = outbox_of(client, taken)
    outbox.put(b"first")
    await outbox.flush()

    def late() -> None:
        time.sleep(0.12)
        asyncio.get_running_loop().call_soon(outbox.put, b"second")  # in the turn in which the first's watch is due

    asyncio.get_running_loop().call_soon(late)
    await asyncio.sleep(0.05)
    assert not outbox.ended.done()
    await outbox.flush()
    assert client.sent == [b"first", b"second"]
    outbox.close()


async def test_a_message_that_may_not_go_out_ends_it() -> None:
    client, taken = Client(), list[int | None]()
    outbox = outbox_of(client, taken, good=False)
    outbox.put(b"secret", 1)
    with pytest.raises(PermissionError):
        await asyncio.wait_for(asyncio.shield(outbox.ended), 5)
    outbox.put(b"after", 2)
    outbox.close()
    assert (client.sent, taken) == ([], [1, 2])
