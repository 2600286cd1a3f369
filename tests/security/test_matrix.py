"""Every RPC of the protocol, by every kind of caller, about a session of its own, of another tenant and of nobody."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from kvstore_client import GrpcTransport
from kvstore_client.access import Access
from kvstore_server import app
from kvstore_server.app import Server
from kvstore_server.identity.caller import ROLES, Role
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.rpc.authentication import NEEDED, Call
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.local import LocalStore

from ..certificates import Authority
from ..running import serving
from .calling import METHODS, Answer, ask
from .one_of_each import REQUESTS, append, create, expected
from .recording import Recorder

TARGETS = ("own", "foreign", "missing")
CERTIFICATES = {
    "spiffe://test/a-writer": {"tenant": "a", "role": "writer"},
    "reader.a.test": {"tenant": "a", "role": "reader"},
}


@dataclass(frozen=True)
class Identity:
    """How a caller presents itself; without a tenant it must be refused whatever it asks."""

    transport: GrpcTransport
    tenant: str | None = None
    role: Role = "reader"


@dataclass(frozen=True)
class Presented(Access):
    """Whatever a caller may put into its metadata."""

    authorizations: tuple[str, ...] = ()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(("authorization", each) for each in self.authorizations)


class Matrix:
    """A server with two tenants, and those who call it."""

    def __init__(self, server: Server, recorder: Recorder, identities: dict[str, Identity]) -> None:
        self.identities, self.cells = identities, 0
        self._server, self._recorder = server, recorder
        self._numbers = count()
        self._shared: dict[str, str] = {}
        self._foreign: list[str] = []

    async def complaints(self) -> list[str]:
        """One line for each cell that is not as it must be."""
        found = [
            f"{method} by {name}: {what}"
            for method in METHODS
            for name, identity in self.identities.items()
            async for what in self._row(method, identity)
        ]
        return [*found, *await self._changes_in_foreign_sessions()]

    async def _row(self, method: str, identity: Identity) -> AsyncIterator[str]:
        names = await self._sessions(identity.tenant)
        answers: dict[str, Answer] = {}
        work: dict[str, list[str]] = {}
        for target, name in names.items():
            await self._settle()
            self._recorder.operations.clear()
            answer = await ask(identity.transport, method, REQUESTS[method](name))
            await self._settle()
            answers[target] = _without(name, answer)
            work[target] = [" ".join(each).replace(name, "NAME") for each in self._recorder.operations]
            self.cells += 1
            if (must := _code(method, identity, target)) != answer.code:
                yield f"{target} is answered {answer.code} and not {must}"
        refused = identity.tenant is None or not _may(identity.role, method)
        if refused and (any(work.values()) or len(set(answers.values())) > 1):
            yield f"refused, but {answers} after {work}"
        if method != "CreateSession" and answers["foreign"] != answers["missing"]:
            yield f"foreign {answers['foreign']} is told from missing {answers['missing']}"
        if work["foreign"] != work["missing"]:
            yield f"foreign costs {work['foreign']}, missing {work['missing']}"

    async def _sessions(self, tenant: str | None) -> dict[str, str]:
        """Two of their own for each row; those who are refused whatever they ask share theirs."""
        if tenant is None and self._shared:
            return self._shared
        number = next(self._numbers)
        names = {target: f"{target[0]}{number}" for target in TARGETS}
        await self._make(tenant or "a", names["own"])
        await self._make(_other(tenant or "a"), names["foreign"])
        if tenant is None:
            self._shared = names
        if tenant != "b":
            self._foreign.append(names["foreign"])
        return names

    async def _make(self, tenant: str, name: str) -> None:
        admin = self.identities[f"admin of {tenant}"].transport
        for method, requests in (("CreateSession", create(name)), ("Append", append(name, 0))):
            answer = await ask(admin, method, requests)
            assert answer.code == "OK", answer

    async def _settle(self) -> None:
        """Nothing that an earlier call left to do comes later."""
        await self._server.sessions._indexing.flush()  # pyright: ignore[reportPrivateUsage]

    async def _changes_in_foreign_sessions(self) -> list[str]:
        """Of those that the callers of tenant a asked for in tenant b."""
        admin = self.identities["admin of b"].transport
        answers = {name: await ask(admin, "TopK", REQUESTS["TopK"](name)) for name in self._foreign}
        return [f"session {name} of tenant b: {answer.code}" for name, answer in answers.items() if answer.code != "OK"]


def _other(tenant: str) -> str:
    return "b" if tenant == "a" else "a"


def _may(role: Role, method: str) -> bool:
    needed = {"PutProjection": "admin"} | dict.fromkeys(
        ("CreateSession", "UpdateSession", "DeleteSession", "ForkSession", "Append"), "writer"
    )
    return ROLES.index(role) >= ROLES.index(needed.get(method, "reader"))


def _code(method: str, identity: Identity, target: str) -> str:
    if identity.tenant is None:
        return "UNAUTHENTICATED"
    return expected(method, target) if _may(identity.role, method) else "PERMISSION_DENIED"


def _without(name: str, answer: Answer) -> Answer:
    facts = tuple((key, value.replace(name, "NAME")) for key, value in answer.facts)
    return Answer(answer.code, answer.text.replace(name, "NAME"), answer.reason, facts, answer.responses)


@asynccontextmanager
async def matrix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Matrix]:
    keys = KeyStore(LocalStore(folder / "data"))
    made = {f"{role} of {tenant}": keys.create(tenant, role) for tenant in "ab" for role in ROLES}
    expired, revoked = keys.create("a", "admin", lifetime_seconds=1e-3), keys.create("a", "admin")
    keys.revoke(revoked.split("_")[1])
    authority = Authority(folder)
    recorder, open_store, open_index = Recorder(), app.open_store, app.open_index
    monkeypatch.setattr(app, "open_store", lambda settings: recorder.store(open_store(settings)))
    monkeypatch.setattr(app, "open_index", lambda settings: recorder.index(open_index(settings)))
    sections = {
        "listen": {"mtls_address": "127.0.0.1:0"},
        "identity": {"api_keys": True, "certificates": CERTIFICATES},
        "tls": authority.server_section(),
        "staleness_seconds": 80_000.0,
        "sweep_seconds": 80_000.0,
    }
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(folder / "data", **sections))

        numbers = count()

        def by(subject: str = "", *authorizations: str) -> GrpcTransport:
            tls = authority.client(f"client{next(numbers)}", subject) if subject else authority.client()
            port = server.mtls_port if subject else server.port
            transport = GrpcTransport(f"localhost:{port}", access=Presented(None, tls, authorizations))
            stack.push_async_callback(transport.close)
            return transport

        admin, other = f"Bearer {made['admin of a']}", f"Bearer {made['admin of b']}"
        writer, reader, stranger = "spiffe://test/a-writer", "reader.a.test", "stranger.test"
        refused = {
            "nobody": by(),
            "no key": by("", "Bearer x"),
            "another scheme": by("", admin.replace("Bearer", "Basic")),
            "a wrong secret": by("", f"{admin[:-43]}{other[-43:]}"),
            "an unknown key": by("", f"Bearer kvs_{'0' * 16}_{admin[-43:]}"),
            "an expired key": by("", f"Bearer {expired}"),
            "a revoked key": by("", f"Bearer {revoked}"),
            "two keys": by("", admin, admin),
            "an unknown certificate": by(stranger),
            "a certificate and another tenant's key": by(writer, other),
            "a certificate and a revoked key": by(writer, f"Bearer {revoked}"),
        }
        accepted = {
            f"{role} of {tenant}": Identity(by("", f"Bearer {made[f'{role} of {tenant}']}"), tenant, role)
            for tenant in "ab"
            for role in ROLES
        }
        certified = {
            "a certificate": Identity(by(writer), "a", "writer"),
            "a certificate and a key": Identity(by(reader, admin), "a", "reader"),
            "a key beside an unknown certificate": Identity(by(stranger, admin), "a", "admin"),
        }
        identities = {name: Identity(transport) for name, transport in refused.items()} | accepted | certified
        yield Matrix(server, recorder, identities)


@pytest.mark.slow
async def test_every_caller_may_do_what_its_role_allows_to_its_own_tenant_s_sessions_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    async with matrix(tmp_path, monkeypatch) as every:
        assert await every.complaints() == []
        record_property("cases", every.cells)
        assert every.cells == len(METHODS) * len(every.identities) * len(TARGETS)
        print(f"{len(METHODS)} RPCs x {len(every.identities)} callers x {len(TARGETS)} sessions: {every.cells} cells")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a role too low", "one tenant for all", "a look at the other tenant"])
async def test_a_hole_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Over a few RPCs: the matrix itself must be able to fail."""
    if fault == "a role too low":
        monkeypatch.setitem(NEEDED, "DeleteSession", "reader")
    elif fault == "one tenant for all":
        monkeypatch.setattr(Call, "tenant", "b")
    else:
        find = Registry.find

        async def curious(self: Registry, tenant: str, name: str) -> object:
            found = await find(self, tenant, name)
            if found is None:
                await self._from_store(_other(tenant), name)  # pyright: ignore[reportPrivateUsage]
            return found

        monkeypatch.setattr(Registry, "find", curious)
    for method in METHODS.keys() - {"CreateSession", "Append", "GetSession", "DeleteSession", "TopK"}:
        monkeypatch.delitem(METHODS, method)
    async with matrix(tmp_path, monkeypatch) as some:
        assert await some.complaints()
