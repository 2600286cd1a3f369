"""`kvstore sessions`: what a running server has."""

import typer

from kvstore_server.commands.arguments import TARGET, TargetOption, client_of

sessions = typer.Typer(no_args_is_help=True, help="Sessions of a running server.")


@sessions.command("list")
def list_sessions(prefix: str = "", target: TargetOption = TARGET) -> None:
    """Every session: tokens, bytes, ratio, codec."""
    from kvstore_server.report import print_sessions

    with client_of(target) as client:
        print_sessions(client.list_sessions(prefix))


@sessions.command()
def show(name: str, target: TargetOption = TARGET) -> None:
    """One session, all there is to know."""
    from kvstore_server.report import print_session

    with client_of(target) as client:
        print_session(client.open_session(name).info())


@sessions.command()
def delete(name: str, target: TargetOption = TARGET) -> None:
    """Delete a session; forks keep what they share."""
    with client_of(target) as client:
        deleted = client.delete_session(name)
    print("deleted" if deleted else "there was no such session")
