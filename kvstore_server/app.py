"""Wires the parts together, serves, and drains."""

import asyncio
import gc
import logging
import os
import signal
import sys
from functools import partial
from importlib.metadata import version
from socket import gethostname
from time import time

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore_server.audit import AuditLog
from kvstore_server.config import Address, Settings
from kvstore_server.config import Index as IndexSettings
from kvstore_server.device import open_device
from kvstore_server.identity.key_ring import KeyRing
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.limits import PROTOCOL_OVERHEAD_BYTES
from kvstore_server.memory.device import EVENTS
from kvstore_server.metadata.index import Index, ReplicaEntry
from kvstore_server.metadata.memory import MemoryIndex
from kvstore_server.metadata.redis import RedisIndex
from kvstore_server.monitoring.history import History
from kvstore_server.monitoring.page import Replica, Session, render
from kvstore_server.monitoring.roll import Roll
from kvstore_server.monitoring.web import Probes, Web
from kvstore_server.redaction import Redactor, secrets_in, session_pseudonym
from kvstore_server.rpc.admission import Admission
from kvstore_server.rpc.authentication import Authenticator
from kvstore_server.rpc.handlers import SERVICE, Handlers
from kvstore_server.rpc.service import KVStoreServicer, server_info
from kvstore_server.rpc.tls import open_ports
from kvstore_server.scheduling.engine import Engine
from kvstore_server.sessions.attention import Device
from kvstore_server.sessions.service import SessionService
from kvstore_server.storage.opening import open_store
from kvstore_server.telemetry import Telemetry

LOG = logging.getLogger(__name__)
SWITCH_SECONDS = 0.0005
"""How long the event loop may keep the interpreter from the device's thread while both have work: 5 ms by default."""
DEVICE_LOST_EXIT = 3
LIVENESS = "liveness"
"""What a health check asks about to learn whether the process is to be ended: SERVING while it drains, too."""
LIVE_SECONDS = 5.0


class Server:
    """One replica. `start` returns when it is SERVING; `drain` finishes what was admitted."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.admission = Admission(
            settings.limits,
            weight_of=settings.weight_of,
            has_tenants=settings.identity.is_asked,
            wait_seconds=self._wait_seconds,
        )
        self.telemetry = Telemetry()
        self.port = self.mtls_port = 0
        self.failed = asyncio.Event()
        """Set when the device is lost: nothing can be answered any more."""
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]

    async def start(self) -> None:
        """Opens the store and the device, checks both, and serves. Raises what stops it."""
        settings = self.settings
        self._loop = asyncio.get_running_loop()
        store = open_store(settings.storage)
        await asyncio.to_thread(store.probe)
        self._audit = AuditLog(settings.log.audit_file, redactor(settings))
        self._keys = KeyRing(KeyStore(store)) if settings.identity.api_keys else None
        if self._keys is not None:
            await self._keys.start()
        device = await asyncio.to_thread(open_device, settings.device)
        backend = device.backend
        self._engine = Engine(
            settings.limits.device_waiting_max,
            backend.is_fatal,
            self._device_lost,
            self.telemetry.ran,
            backend.ordered,
            settings.weight_of,
            device.setups,
        )
        index = open_index(settings.index)
        append_room = self.admission.pools["appends"]
        self.sessions = SessionService(store, index, self._engine, device, settings, self.telemetry, append_room)
        self._measure(device)
        await self.sessions.start()
        info = server_info(
            version("remote-kv-store"), backend.name, self.sessions, settings.storage.kind, settings.index.url
        )
        self._grpc = grpc.aio.server(options=_options(settings))
        servicer = KVStoreServicer(self.sessions, self.admission, info)
        authenticator = Authenticator(settings.identity, self._keys)
        handlers = Handlers(servicer, authenticator, self.admission, self.telemetry, self._audit, settings.limits)
        self._grpc.add_generic_rpc_handlers((handlers.generic(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if settings.listen.reflection:
            names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        self.port, self.mtls_port = open_ports(self._grpc, settings)
        await self._grpc.start()
        self._history = History(self.telemetry.registry)
        self._history.note()
        self._roll = Roll(index, partial(self._entry, info.version, backend.name))
        self._watching = [asyncio.create_task(each.run()) for each in (self._history, self._roll)]
        self.web = self._open_web(info.version, backend.name)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        LOG.info(
            "serving on %s, device %s, store %s, index %s",
            Address(settings.listen.address.host, self.port),
            backend.name,
            settings.storage.url,
            settings.index.url,
        )

    async def drain(self) -> bool:
        """NOT_SERVING, no new calls, admitted ones finish within `drain_seconds`; False if some had to be cut off."""
        LOG.info("draining, %d calls in flight", self.admission.in_flight)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.admission.draining.set()
        finished = True
        try:
            await asyncio.wait_for(self.admission.idle(), self.settings.drain_seconds)
        except TimeoutError:
            finished = False
        await self._grpc.stop(grace=0 if not finished else 1)
        for task in self._watching:
            task.cancel()
        await self._roll.note()
        await self.sessions.close()
        if self._keys is not None:
            await self._keys.close()
        self._audit.close()
        await asyncio.to_thread(self._engine.close, 5.0)
        if self.web is not None:
            await asyncio.to_thread(self.web.close)
        LOG.info("drained" if finished else "cut off what did not finish within drain_seconds")
        return finished

    def _open_web(self, version: str, device: str) -> Web | None:
        settings = self.settings
        if settings.listen.metrics_address is None:
            return None
        replica = Replica(
            version=version,
            address=str(Address(settings.listen.address.host, self.port)),
            device=device,
            store=settings.storage.kind,
            index=settings.index.url,
            started_unix_seconds=time(),
        )
        probes = Probes(live=self._is_live, ready=lambda: self._state == "serving")
        page = partial(self._page, replica)
        return Web(settings.listen.metrics_address, self.telemetry.registry, page, probes)

    def _wait_seconds(self, tenant: str, before: int, enough: float) -> float:
        return self._engine.wait_seconds(tenant, before, enough)

    def _device_lost(self, error: BaseException) -> None:
        """On a thread of the engine."""
        LOG.critical("the device failed, and with it every query on it; the server is ending", exc_info=error)
        self._loop.call_soon_threadsafe(self.failed.set)

    def _measure(self, device: Device) -> None:
        registry, engine, gauge = self.sessions.registry, self._engine, self.telemetry.gauge
        maintenance, quality = self.sessions.maintenance, self.sessions.quality
        gauge("kvstore_sessions", "Sessions of the store", lambda: maintenance.census.total.sessions)
        gauge("kvstore_session_tokens", "Their tokens", lambda: maintenance.census.total.tokens)
        gauge("kvstore_stored_bytes", "Bytes of their objects", lambda: maintenance.census.total.stored_bytes)
        gauge("kvstore_raw_bytes", "Bytes of their tokens in their dtypes", lambda: maintenance.census.total.raw_bytes)
        gauge("kvstore_quality_kept_bytes", "Of vectors kept to compare answers with", lambda: quality.kept_bytes)
        gauge("kvstore_quality_kept_sessions", "Sessions of which there are some", lambda: quality.kept_sessions)
        gauge("kvstore_resident_bytes", "Bytes of loaded sessions", lambda: registry.resident_bytes)
        gauge("kvstore_resident_sessions", "Sessions that are loaded", lambda: registry.resident_sessions)
        gauge("kvstore_device_waiting", "Pieces of work that wait for the device", lambda: engine.waiting)
        gauge("kvstore_device_runs", "Runs of the device since the start", lambda: engine.runs)
        gauge("kvstore_device_run_items", "Pieces of work answered by them", lambda: engine.run_items)
        memory = device.memory
        gauge("kvstore_device_bytes", "Bytes of the device's slab in use", lambda: memory.used_bytes if memory else 0)
        gauge("kvstore_device_size_bytes", "Bytes of that slab", lambda: memory.size_bytes if memory else 0)
        gauge("kvstore_device_sessions", "Sessions on the device", lambda: memory.sessions if memory else 0)
        for name, text in EVENTS.items():
            read = partial(memory.counts.__getitem__, name) if memory else lambda: 0
            gauge(f"kvstore_device_{name}", f"{text} since the start", read)
        gauge("kvstore_index_lag", "Changes that the index has not seen", lambda: self.sessions.index_lag)
        gauge("kvstore_expiry_stopped", "Whether too many are due at once", lambda: self.sessions.expiry.stopped)
        merging = self.sessions.merging
        gauge("kvstore_merged_objects", "Objects made of small ones since the start", lambda: merging.merged)
        gauge("kvstore_audit_lost", "Lines of the audit log that could not be written", lambda: self._audit.lost)
        gauge("kvstore_calls_in_flight", "Calls being answered", lambda: self.admission.in_flight)
        for name, pool in self.admission.pools.items():
            gauge(f"kvstore_places_{name}", f"Places of `{name}` that are taken", lambda pool=pool: pool.held)

    def _page(self, replica: Replica) -> str:
        """On a thread of the web server, which asks nobody who they are."""
        hidden = self.settings.identity.is_asked
        largest = [
            Session(
                session_pseudonym(each.tenant, each.name) if hidden else each.name,
                each.length,
                each.stored_bytes,
                each.raw_bytes,
            )
            for each in self.sessions.maintenance.census.largest
        ]
        return render(replica, self._state, self._history, largest, self._roll.replicas)

    def _entry(self, version: str, device: str, now: float) -> ReplicaEntry:
        name = f"{gethostname()}:{self.port}"
        return ReplicaEntry(name=name, version=version, device=device, state=self._state, seen_unix_seconds=now)

    def _is_live(self) -> bool:
        """Whether the event loop still turns. On a thread of the web server."""
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(LIVE_SECONDS)
        except TimeoutError:
            return False
        return True

    @property
    def _state(self) -> str:
        return "draining" if self.admission.draining.is_set() else "serving"

    async def _set_health(self, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        for service in ("", SERVICE.full_name):
            await self._health.set(service, status)


async def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once. The process's exit code.

    What is acknowledged is in the store by then, so nothing is lost with a process that ends at once.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = Server(settings)
    await server.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gc.collect()
    gc.freeze()  # what has been imported is not looked through again and again while answers wait
    ends = [asyncio.ensure_future(event.wait()) for event in (stop, server.failed)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 128 + number)
    drained = await server.drain()
    return DEVICE_LOST_EXIT if server.failed.is_set() else 0 if drained else 1


def open_index(settings: IndexSettings) -> Index:
    """The index that the settings name; it is not asked anything yet."""
    if settings.url == "memory":
        return MemoryIndex()
    return RedisIndex(
        settings.url,
        password=settings.read_password(),
        tls_ca_file=settings.tls_ca_file,
        timeout_seconds=settings.timeout_seconds,
    )


def redactor(settings: Settings) -> Redactor:
    """For everything that is written about what this process does."""
    password = settings.index.read_password()
    return Redactor([*secrets_in(), *([password] if password else [])])


def _options(settings: Settings) -> list[tuple[str, int]]:
    limits = settings.limits
    message = limits.message_bytes_max + PROTOCOL_OVERHEAD_BYTES
    return [
        ("grpc.max_receive_message_length", message),
        ("grpc.max_send_message_length", message),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", limits.keepalive_seconds * 1000),
        ("grpc.keepalive_timeout_ms", limits.keepalive_timeout_seconds * 1000),
        # What really bounds the wait for a ping's answer: a minute by default, whatever the timeout above is.
        ("grpc.http2.ping_timeout_ms", limits.keepalive_timeout_seconds * 1000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_connection_age_ms", limits.connection_seconds_max * 1000),
        ("grpc.max_connection_age_grace_ms", limits.connection_grace_seconds * 1000),
        ("grpc.max_concurrent_streams", limits.connection_calls_max),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        # A stream that nobody reads yet, as of a caller who will be refused, takes no more than this: two of the
        # messages that appends come in, for with less they wait for one another.
        ("grpc.http2.lookahead_bytes", 4 << 20),
        ("grpc.http2.bdp_probe", 0),
        # Only identity: gRPC inflates a compressed message before its size is checked.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]
