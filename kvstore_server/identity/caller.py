"""Who makes a call."""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["reader", "writer", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each may do what those before it may."""


@dataclass(frozen=True)
class Caller:
    """`name` is for the audit log. `key_id` names the API key that was shown, if one was."""

    tenant: str
    role: Role
    name: str
    key_id: str | None = None

    def may(self, needed: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(needed)


ANYONE = Caller(tenant="default", role="admin", name="anyone")
"""Every caller of a server without identity."""
