"""Which formats this code may read."""

from kvstore_server.errors import FailedPrecondition


def check_readable(min_reader: object, newest: int, what: str) -> None:
    """FailedPrecondition unless the oldest reader that `what` asks for is at most `newest`."""
    if str(min_reader) not in {str(version) for version in range(1, newest + 1)}:
        raise FailedPrecondition("FORMAT_VERSION", f"a newer version wrote this {what}", min_reader=min_reader)
