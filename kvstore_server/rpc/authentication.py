"""Who a caller is, by an API key, a client certificate or both, and what role each RPC needs."""

from collections.abc import Iterable
from dataclasses import dataclass

import grpc

from kvstore_server.access import Identity
from kvstore_server.errors import PermissionDenied, Unauthenticated
from kvstore_server.identity.api_keys import parse_key
from kvstore_server.identity.caller import ANYONE, Caller, Role
from kvstore_server.identity.key_ring import KeyRing

NEEDED: dict[str, Role] = {
    "CreateSession": "writer",
    "GetSession": "reader",
    "ListSessions": "reader",
    "UpdateSession": "writer",
    "DeleteSession": "writer",
    "ForkSession": "writer",
    "MatchPrefix": "reader",
    "Prefetch": "reader",
    "Append": "writer",
    "Score": "reader",
    "TopK": "reader",
    "Attend": "reader",
    "Fetch": "reader",
    "PutProjection": "admin",  # all tenants see projections
    "GetProjection": "reader",
    "ListProjections": "reader",
    "GetServerInfo": "reader",
}


@dataclass(frozen=True)
class Call:
    """What an RPC knows of its caller besides the request. `deadline` is on time.monotonic()'s clock."""

    caller: Caller
    deadline: float

    @property
    def tenant(self) -> str:
        return self.caller.tenant


class Authenticator:
    """Refuses with one text whatever is wrong with an identity."""

    def __init__(self, identity: Identity, keys: KeyRing | None) -> None:
        self._identity, self._keys = identity, keys

    def caller_of(self, context: grpc.aio.ServicerContext) -> Caller:
        """Raises Unauthenticated; Unavailable if the store does not tell which keys are good.

        A key and a certificate that are both known must be of one tenant; the caller then has the lesser role.
        """
        if not self._identity.is_asked:
            return ANYONE
        found: list[Caller] = []
        if self._keys is not None and (token := _token(context)) is not None:
            found.append(self._keys.caller_of(token) or _refuse())
        if self._identity.certificates:
            names = _subject_names(context)
            holders = [
                (name, self._identity.certificates[name]) for name in names if name in self._identity.certificates
            ]
            found += [Caller(holder.tenant, holder.role, f"certificate {name}") for name, holder in holders]
        if not found or len({caller.tenant for caller in found}) > 1:
            _refuse()
        least = next(caller for caller in found if all(other.may(caller.role) for other in found))
        key_id = next((caller.key_id for caller in found if caller.key_id), None)
        return Caller(least.tenant, least.role, ", ".join(caller.name for caller in found), key_id)

    def check(self, caller: Caller) -> None:
        """Raises Unauthenticated if a key that was good when the call began no longer is."""
        if self._keys is not None and caller.key_id is not None and not self._keys.is_good(caller.key_id):
            _refuse()


def check_role(caller: Caller, method: str) -> None:
    """Raises PermissionDenied unless the caller may call `method`, whatever it is about."""
    if not caller.may(NEEDED[method]):
        raise PermissionDenied("ROLE", f"{method} needs the role {NEEDED[method]}", role=NEEDED[method])


def presented(context: grpc.aio.ServicerContext) -> str:
    """Who a refused caller claimed to be, without the secret."""
    parsed = parse_key(_token(context) or "")
    return f"key {parsed[0]}" if parsed else "unknown"


def _refuse() -> Caller:
    raise Unauthenticated("NO_IDENTITY", "the call shows no valid API key or certificate")


def _token(context: grpc.aio.ServicerContext) -> str | None:
    """What follows `Bearer` in the metadata `authorization`, empty if that says something else; None without any."""
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not values:
        return None
    scheme, _, token = str(values[0]).partition(" ")
    return token if len(values) == 1 and scheme.lower() == "bearer" else ""


def _subject_names(context: grpc.aio.ServicerContext) -> Iterable[str]:
    """DNS names and URIs of the client certificate, which the handshake has verified."""
    facts = context.auth_context()
    return [name.decode() for kind in ("peer_dns", "peer_uri") for name in facts.get(kind, ())]
