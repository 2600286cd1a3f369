"""What everything in Redis is called. The tenant is in braces, so that a cluster keeps one tenant's keys together."""

NAMESPACE = "kvstore:v1:"
NOTICES = f"{NAMESPACE}notices"
"""The pub/sub channel."""
REPLICAS = f"{NAMESPACE}replicas"
"""The hash of servers."""
CENSUS = f"{NAMESPACE}census"
"""What a server counted for all, until it expires."""


def key(tenant: str, *parts: str) -> str:
    """The key of one thing of one tenant: sessions, names, used, or removed and a name."""
    return f"{NAMESPACE}{{{tenant}}}:{':'.join(parts)}"
