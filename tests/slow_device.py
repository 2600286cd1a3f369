"""`kvstore` with a device that takes SLOW_DEVICE_SECONDS longer for each TopK and each Attend step.

So a server has a known capacity that does not depend on the machine it runs on. Run as a script, or by the forge.
"""

import os
import time
from typing import Any

from kvstore_server.cli import main
from kvstore_server.rpc.admission import Turns
from kvstore_server.sessions import attention

SECONDS = "SLOW_DEVICE_SECONDS"
_top_k, _attend = attention.top_k, attention.Pass.run


def top_k(*arguments: Any) -> Any:
    time.sleep(float(os.environ[SECONDS]))
    return _top_k(*arguments)


def attend(asked: attention.Pass, items: list[Any]) -> Any:
    time.sleep(float(os.environ[SECONDS]) * len(items))
    return _attend(asked, items)


def slow_down() -> None:
    attention.top_k = top_k
    attention.Pass.run = attend  # pyright: ignore[reportAttributeAccessIssue]
    if os.environ.get("ADMIT_ALL"):  # the bug that the test of overload must find
        Turns.check = lambda self, deadline: None


if __name__ == "__main__":
    slow_down()
    main()
