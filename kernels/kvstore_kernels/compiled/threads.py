"""Tasks spread over as many threads as torch may use.

Not numba's own parallel loops: their default threading layer ends the process when two threads enter it at once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def run(task: Callable[[int], None], count: int) -> None:
    """task(0) .. task(count - 1), once each, in any order; returns when all have ended."""
    pending = iter(range(count))

    def work() -> None:
        for index in pending:
            task(index)

    helpers = min(torch.get_num_threads(), count) - 1
    futures = [_pool(os.getpid()).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():
                future.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One pool a process: threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=f"kvstore-kernels-{process}")
