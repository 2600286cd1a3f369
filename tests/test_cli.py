"""The command line as a whole: what it says of a refusal."""

import pytest

from kvstore_client import NotFound
from kvstore_server import cli


def test_a_refusal_is_one_line_that_names_its_code_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise NotFound("no session 's' of layers [a, b]")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "NOT_FOUND: no session 's' of layers [a, b]\n"
