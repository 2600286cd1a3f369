"""The command line as a whole: what it says of a refusal."""

from time import sleep

import pytest

from kvstore_client import NotFound
from kvstore_server import cli
from kvstore_server.commands import arguments
from kvstore_server.commands.arguments import client_of


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


@pytest.mark.parametrize(("seconds", "said"), [(0.0, "waiting for 127.0.0.1:1\n"), (60.0, "")])
def test_a_command_says_when_it_waits_for_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, said: str
) -> None:
    monkeypatch.setattr(arguments, "WAIT_SECONDS", seconds)
    with client_of("127.0.0.1:1"):
        sleep(0.2)
    assert capsys.readouterr().err == said
