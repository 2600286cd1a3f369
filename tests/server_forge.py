"""Servers that are there in a moment: each is forked from one process that has imported everything that takes time.

Run as a script with a socket as its first argument, it forks a server for every message of arguments, environment and a
pipe for its standard error, and answers the server's process id; or says how one ended.
"""

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

PR_SET_PDEATHSIG = 1
MESSAGE_BYTES_MAX = 1 << 16
RUNNING = 1000
"""In place of an exit code."""


class Forge:
    """The process, seen from the tests. Several threads may use it. It ends with them, and its servers with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
                start_new_session=True,  # an interrupt in the terminal is for who stops the servers in order
            )

    def start(self, arguments: list[str], environment: dict[str, str], stderr: int) -> "ForgedProcess":
        """A new `kvstore` with these arguments."""
        message = {"arguments": arguments, "environment": environment}
        return ForgedProcess(self, self.ask(message, [stderr]))

    def ask(self, message: dict[str, Any], descriptors: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
            return int(self._socket.recv(MESSAGE_BYTES_MAX))

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # it is still importing
            self._process.kill()
            self._process.wait(10)


class ForgedProcess:
    """What subprocess.Popen offers, of a process that the forge made."""

    def __init__(self, forge: Forge, pid: int) -> None:
        self.pid = pid
        self._forge = forge
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and (code := self._forge.ask({"ended": self.pid}, [])) != RUNNING:
            self._code = code
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        give_up = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > give_up:
                raise subprocess.TimeoutExpired("kvstore", timeout)
            time.sleep(0.005)
        return code


def _become_a_server(arguments: list[str], environment: dict[str, str], stderr: int) -> None:
    from kvstore_server.cli import main

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(stderr, 2)
    os.close(stderr)
    os.environ.update(environment)
    sys.argv = ["kvstore", *arguments]
    if "SLOW_DEVICE_SECONDS" in environment:
        importlib.import_module("slow_device").slow_down()
    main()


def _forge(asked: socket.socket) -> None:
    for slow in ("kvstore_kernels.compiled.backend", "kvstore_server.app", "kvstore_server.storage.bucket", "uvloop"):
        importlib.import_module(slow)

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    while True:
        data, descriptors, _, _ = socket.recv_fds(asked, MESSAGE_BYTES_MAX, 1)
        if not data:
            return
        message = json.loads(data)
        if "ended" in message:
            pid, status = os.waitpid(message["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else RUNNING
        elif (answer := os.fork()) == 0:
            asked.close()
            _become_a_server(message["arguments"], message["environment"], descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(str(answer).encode())


if __name__ == "__main__":
    _forge(socket.socket(fileno=int(sys.argv[1])))
