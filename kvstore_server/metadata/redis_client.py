"""Clients of Redis by url: one server, those that sentinels name, or a cluster."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import ExponentialWithJitterBackoff

CONNECTIONS_MAX = 32
"""Of one client to one server, which must not use more at a time."""
RETRIES_MAX = 2
IDLE_SECONDS = 15.0
"""A connection that was quiet for so long is asked whether it lives."""
SENTINEL_SHARE = 0.25
"""Of the time for one operation, for one sentinel: one that hangs must leave time to ask another."""


def connect(
    url: str,
    *,
    password: str | None = None,
    tls_ca_file: Path | None = None,
    timeout_seconds: float = 1.0,
    retries: int = RETRIES_MAX,
) -> Redis | RedisCluster:
    """A client that has not connected yet. `url` is of a form that config.Index.url names."""
    options: dict[str, Any] = {
        "password": password,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "health_check_interval": IDLE_SECONDS,
        "max_connections": CONNECTIONS_MAX,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.25), retries),
    }
    scheme, _, kind = urlsplit(url).scheme.partition("+")
    tls: dict[str, Any] = {"ssl_ca_certs": str(tls_ca_file)} if tls_ca_file else {}
    if not kind:
        return Redis.from_pool(ConnectionPool.from_url(url, **options, **(tls if scheme == "rediss" else {})))
    tls = {"ssl": True, **tls} if scheme == "rediss" else {}
    place = urlsplit(url)
    user, _, hosts = place.netloc.rpartition("@")
    options |= {"username": unquote(user) or None, **tls}
    nodes = [_host_and_port(each, 26379 if kind == "sentinel" else 6379) for each in hosts.split(",")]
    if kind == "cluster":
        return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in nodes], **options)
    service, _, database = place.path.strip("/").partition("/")
    seconds = timeout_seconds * SENTINEL_SHARE
    sentinels = Sentinel(nodes, sentinel_kwargs={"socket_timeout": seconds, "socket_connect_timeout": seconds, **tls})
    return sentinels.master_for(service, db=int(database or 0), **options)


async def close(client: Redis | RedisCluster) -> None:
    """With the clients of sentinels, which it does not close itself."""
    await client.aclose()
    if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _host_and_port(text: str, default_port: int) -> tuple[str, int]:
    place = urlsplit(f"//{text}")
    return place.hostname or "", place.port or default_port
