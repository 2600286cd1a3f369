"""What a server does where the device that it is to use is not there or computes wrongly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvstore_kernels import Backend
from kvstore_server import device
from kvstore_server.config import Device
from kvstore_server.device import open_device
from kvstore_server.scheduling.self_check import SelfCheckError

from .running import CLI

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_a_device_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, *CLI, "serve", "--data", str(tmp_path), "--metrics", "off", "--device", "cuda:0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "the server stops: cuda:0 cannot be used: " in line


def test_auto_says_why_the_cpu_serves(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "self_check", lambda _: None)
    caplog.set_level("INFO")
    assert open_device(Device(name="auto")).backend.name == "cpu"
    assert "cuda:0 cannot be used" in caplog.messages[0]
    assert caplog.messages[0].endswith("; the CPU serves")


def test_a_device_that_computes_wrongly_serves_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU plays the device."""
    open_cpu, checked = device.open_backend, list[Backend]()

    def fail_once(backend: Backend) -> None:
        checked.append(backend)
        if len(checked) == 1:
            raise SelfCheckError("its sums are wrong")

    monkeypatch.setattr(device, "open_backend", lambda _: open_cpu("cpu"))
    monkeypatch.setattr(device, "self_check", fail_once)
    assert open_device(Device(name="auto")).backend is checked[1]
    assert "its sums are wrong; the CPU serves" in caplog.messages
    checked.clear()
    with pytest.raises(SelfCheckError):
        open_device(Device(name="cuda:0"))
