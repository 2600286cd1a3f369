import pytest

from kvstore_server.redaction import HIDDEN, Redactor, pseudonym, secrets_in, session_pseudonym

KEY = f"kvs_0123456789abcdef_{'s3cret-canary_'.ljust(43, 'x')}"
PEM = "-----BEGIN EC PRIVATE KEY-----\ncanary\n-----END EC PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (f"key {KEY}.", f"key kvs_0123456789abcdef_{HIDDEN}."),
        (f"('authorization', 'Bearer {KEY}')", f"('authorization', 'Bearer kvs_0123456789abcdef_{HIDDEN}')"),
        ("authorization: bearer canary", f"authorization: bearer {HIDDEN}"),
        ("redis://user:canary@host:1/0 is away", f"redis://user:{HIDDEN}@host:1/0 is away"),
        ("rediss://:canary@host", f"rediss://:{HIDDEN}@host"),
        ("password=canary, x", f"password={HIDDEN}, x"),
        ("{'aws_secret_access_key': 'canary'}", f"{{'aws_secret_access_key': {HIDDEN}}}"),
        (f"before {PEM} after", f"before {HIDDEN} after"),
        ("before -----BEGIN PRIVATE KEY-----\ncanary", f"before {HIDDEN}"),
        ("the value planted-canary itself", f"the value {HIDDEN} itself"),
    ],
)
def test_what_is_secret_is_cut_out(text: str, redacted: str) -> None:
    assert Redactor(["planted-canary", "plant"])(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "serving on 127.0.0.1:7700, device cpu, store s3://bucket/path, index redis://redis:6379/0",
        "found 3 sessions",
        "incident 0123456789abcdef",
        "key 0123456789abcdef",
        "tokens: 5 of 6, keys: 7",
    ],
)
def test_what_is_not_secret_stays(text: str) -> None:
    assert Redactor()(text) == text


def test_values_of_variables_with_secret_names_are_secret() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "a", "KVSTORE__INDEX__PASSWORD": "b", "KVSTORE_API_KEY": "c", "HOME": "d"}
    assert secrets_in(environment) == ["a", "b", "c"]


def test_a_pseudonym_is_the_same_everywhere_and_not_the_name() -> None:
    assert pseudonym("acme") == "001adf7163de"
    assert pseudonym("acme") != pseudonym("acmf")


def test_sessions_of_one_name_have_pseudonyms_of_their_own() -> None:
    assert session_pseudonym("acme", "book").startswith("001adf7163de/")
    shown = {session_pseudonym(tenant, name).partition("/")[2] for tenant in ("a", "b") for name in ("book", "books")}
    assert len(shown) == 4
