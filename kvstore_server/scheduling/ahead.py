"""Making what comes next while what came before is on its way."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")
END: Any = object()


async def one_ahead(items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The same items. While the caller has one the next is made, and no more; what that raises comes in its turn."""

    async def following() -> T:
        return await anext(items, END)

    async with aclosing(items):
        coming = asyncio.create_task(following())
        try:
            while (item := await coming) is not END:
                coming = asyncio.create_task(following())
                yield item
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
