import pytest

from kvstore_server.identity.api_keys import KeyRecord, make_key, parse_key, read_key_record, write_key_record


def made() -> tuple[str, KeyRecord]:
    return make_key("acme", "writer", label="worker", created_unix_seconds=1.0, expires_unix_seconds=2.0)


def test_a_key_fits_its_record_and_no_other() -> None:
    (token, record), (other, _) = made(), made()
    parsed, foreign = parse_key(token), parse_key(other)
    assert parsed
    assert foreign
    assert parsed[0] == record.id
    assert record.fits(parsed[1])
    assert not record.fits(foreign[1])
    assert not record.fits("")


def test_the_record_does_not_hold_the_secret() -> None:
    token, record = made()
    assert token.rpartition("_")[2] not in str(record)
    assert token[21:].encode() not in write_key_record(record)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "b"},
        {"role": "admin"},
        {"expires_unix_seconds": None},
        {"expires_unix_seconds": 3.0},
        {"verifier": ""},
    ],
)
def test_a_record_that_was_changed_fits_no_key(change: dict[str, object]) -> None:
    token, record = made()
    assert not record.model_copy(update=change).fits(token[21:])


def test_a_record_with_one_bit_flipped_is_unreadable_or_fits_no_key() -> None:
    token, record = made()
    data = write_key_record(record)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            read = read_key_record(bytes(flipped), record.id)
        except ValueError:
            continue
        assert not read.fits(token[21:]), f"bit {position}"


def test_a_record_is_read_as_it_was_written_and_under_its_own_name_only() -> None:
    _, record = made()
    data = write_key_record(record)
    assert read_key_record(data, record.id) == record
    for wrong in (data + b" " * 5000, b"{}", b"", b"\xff"):
        with pytest.raises(ValueError, match=r"key record|KeyRecord"):
            read_key_record(wrong, record.id)
    with pytest.raises(ValueError, match="another key"):
        read_key_record(data, "0" * 16)


@pytest.mark.parametrize("tenant", ["", "a/b", "..", "_keys", "a\n", "a" * 129, "é"])
def test_a_key_of_a_tenant_that_may_not_be_is_not_made(tenant: str) -> None:
    with pytest.raises(ValueError, match="tenant"):
        make_key(tenant, "reader", label="", created_unix_seconds=0, expires_unix_seconds=None)


@pytest.mark.parametrize("token", ["", "kvs_", "kvs_0_x", f"kvs_{'0' * 16}_{'a' * 42}", f"kvs_{'0' * 16}_{'a' * 43}\n"])
def test_what_has_not_the_form_of_a_key_is_none(token: str) -> None:
    assert parse_key(token) is None
