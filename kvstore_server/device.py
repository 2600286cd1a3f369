"""The device that the settings name: chosen, checked and given its memory before anything is served."""

import logging

from kvstore_kernels import Backend, open_backend
from kvstore_server import config
from kvstore_server.memory.device import DeviceMemory
from kvstore_server.scheduling.self_check import SelfCheckError, self_check
from kvstore_server.sessions.attention import Device

LOG = logging.getLogger(__name__)


class DeviceUnusable(RuntimeError):
    """The device is not there, or what it takes is not; the text says so."""


def open_device(settings: config.Device) -> Device:
    """The device, after a self-check that also compiles its ops: half a minute where no machine code was kept.

    `auto` takes the CPU, and says why, where there is no CUDA device or its answers are wrong. Raises DeviceUnusable or
    SelfCheckError for a device that is asked for by name.
    """
    backend = _first() if settings.name == "auto" else _checked(settings.name)
    memory = _memory(backend, settings)
    LOG.info("device %s%s", backend.name, "" if memory is None else f", {memory.size_bytes >> 20} MiB for sessions")
    return Device(backend, memory)


def _first() -> Backend:
    try:
        return _checked("cuda:0")
    except DeviceUnusable as error:
        LOG.info("%s; the CPU serves", error)
    except SelfCheckError as error:
        LOG.warning("%s; the CPU serves", error)
    return _checked("cpu")


def _checked(name: str) -> Backend:
    try:
        backend = open_backend(name)
    except RuntimeError as error:
        raise DeviceUnusable(str(error)) from error
    LOG.info("checking %s, for half a minute where no compiled ops were kept", backend.name)
    self_check(backend)
    return backend


def _memory(backend: Backend, settings: config.Device) -> DeviceMemory | None:
    paging = backend.paging
    if paging is None:
        return None
    size = settings.memory_bytes or int(paging.free_bytes() * settings.memory_share) - settings.staging_bytes
    return DeviceMemory(paging, max(size, settings.staging_bytes), settings.staging_bytes)
