"""Settings: what a tenant may take."""

from typing import Annotated

from pydantic import Field

from kvstore_server.section import Section


class Quota(Section):
    """What each tenant may take; null is no bound. Servers count together by the index, at each sweep."""

    sessions_max: Annotated[int, Field(ge=1)] | None = None
    """Sessions that live at one time."""
    stored_bytes_max: Annotated[int, Field(ge=1)] | None = None
    """Bytes in the store of all of them; what forks share counts once."""
    append_bytes_per_second_max: Annotated[int, Field(ge=1)] | None = None
    """Bytes that one server takes in, on average."""


class Tenant(Section):
    """What one tenant has apart from the others."""

    weight: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Its share of the device and of each limit, against those of the tenants that want something at the same time."""
    quota: Quota | None = None
    """Instead of the quota of every tenant, as a whole."""
