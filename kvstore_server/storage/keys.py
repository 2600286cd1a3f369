"""The names of objects: what lies where, and what a name may look like.

    {tenant}/{session}/meta/{seq}.json                                  records of the session's name
    {tenant}/{session}/{generation}/log/{start}.safetensors             one append
    {tenant}/{session}/{generation}/merged/{seq}-{writer}.safetensors   several, if that record is this writer's
    {tenant}/{session}/{generation}/refs/{child}/{child generation}     a fork shares tokens of this generation

Numbers have twelve digits, so that names sort as numbers. Names of tenants and sessions that start with `_` are the
store's own.
"""

import re

from kvstore_server.errors import InvalidArgument
from kvstore_server.limits import SESSION_NAME

NUMBER_DIGITS = 12
POSITION_MAX = 10**NUMBER_DIGITS - 1
META = "meta"
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,159}", re.ASCII)
_KEY = re.compile(f"{_COMPONENT.pattern}(/{_COMPONENT.pattern})*", re.ASCII)
_NUMBER = re.compile(r"[0-9]{12}", re.ASCII)
_META_NAME = re.compile(r"([0-9]{12})\.json", re.ASCII)
_LOG_NAME = re.compile(r"([0-9]{12})\.safetensors", re.ASCII)
_MERGED_NAME = re.compile(r"([0-9]{12})-[0-9A-Za-z]+\.safetensors", re.ASCII)


def is_component(name: str) -> bool:
    """Whether `name` may stand between two slashes of a key: never `.`, `..`, hidden or empty."""
    return _COMPONENT.fullmatch(name) is not None


def is_key(key: str) -> bool:
    """Whether every component is allowed."""
    return _KEY.fullmatch(key) is not None


def check_key(key: str) -> None:
    """InvalidArgument unless every component is allowed."""
    if not is_key(key):
        raise InvalidArgument("key", "has a component that is not allowed")


def check_name(field: str, name: str) -> None:
    """InvalidArgument unless `name` may be a tenant or a session."""
    if not SESSION_NAME.fullmatch(name):
        raise InvalidArgument(field, "must match [A-Za-z0-9][A-Za-z0-9._-]{0,127}", limit=128)


def generation_name(seq: int) -> str:
    """The generation that the create record `seq` starts."""
    return f"{seq:012d}"


def is_generation(name: str) -> bool:
    return _NUMBER.fullmatch(name) is not None


def meta_folder(tenant: str, session: str) -> str:
    return f"{tenant}/{session}/{META}"


def meta_key(tenant: str, session: str, seq: int) -> str:
    return f"{meta_folder(tenant, session)}/{seq:012d}.json"


def log_folder(tenant: str, session: str, generation: str) -> str:
    return f"{tenant}/{session}/{generation}/log"


def log_key(tenant: str, session: str, generation: str, start: int) -> str:
    if not 0 <= start <= POSITION_MAX:
        raise InvalidArgument("start", f"is outside [0, {POSITION_MAX}]", limit=POSITION_MAX)
    return f"{log_folder(tenant, session, generation)}/{start:012d}.safetensors"


def merged_folder(tenant: str, session: str, generation: str) -> str:
    return f"{tenant}/{session}/{generation}/merged"


def merged_key(tenant: str, session: str, generation: str, name: str) -> str:
    return f"{merged_folder(tenant, session, generation)}/{name}.safetensors"


def merged_name(seq: int, writer: str) -> str:
    """Of the object that the checkpoint `seq` adds, if it becomes this writer's."""
    return f"{seq:012d}-{writer}"


def refs_folder(tenant: str, session: str, generation: str) -> str:
    return f"{tenant}/{session}/{generation}/refs"


def ref_key(tenant: str, parent: str, parent_generation: str, child: str, child_generation: str) -> str:
    """Names the child's generation too: a reference of an earlier child of that name may be about to be collected."""
    return f"{refs_folder(tenant, parent, parent_generation)}/{child}/{child_generation}"


def meta_seqs(keys: list[str]) -> list[int]:
    """The numbers of those keys that name meta records, in the order of the keys."""
    return _numbers(_META_NAME, keys)


def log_starts(keys: list[str]) -> list[int]:
    """The numbers of those keys that name log objects, in the order of the keys."""
    return _numbers(_LOG_NAME, keys)


def merged_seqs(keys: list[str]) -> list[int]:
    """The checkpoints' numbers in those keys that name merged objects, in the order of the keys."""
    return _numbers(_MERGED_NAME, keys)


def _numbers(pattern: re.Pattern[str], keys: list[str]) -> list[int]:
    matches = (pattern.fullmatch(key.rpartition("/")[2]) for key in keys)
    return [int(match[1]) for match in matches if match]
