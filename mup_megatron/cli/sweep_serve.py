"""`sweep serve`: a storage for searches on many machines."""

import signal
from types import FrameType

import click

from mup_megatron.errors import InputError, Terminated


@click.command()
@click.option("--storage", metavar="URL", default="sqlite:///results/served.db", show_default=True,
              help="A SQLite file, or a database server.")  # fmt: skip
@click.option("--host", default="localhost", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=13000, show_default=True)
@click.option("--unprotected", is_flag=True, help="Listen at an address that other machines reach.")
def command(storage: str, host: str, port: int, unprotected: bool) -> None:
    """Serve a storage to searches on other machines, which are given --storage grpc://HOST:PORT.

    The server asks for no password: whoever reaches the port can read and change every study. So another --host than
    this machine's own needs --unprotected, and a network that you trust, or an SSH tunnel instead of it.
    """
    from mup_megatron.search.server import THIS_MACHINE, serve

    if host not in THIS_MACHINE and not unprotected:
        raise InputError(
            f"--host {host}: the server asks for no password, so whoever reaches it can change every study. Add "
            "--unprotected in a network that you trust, or use an SSH tunnel to localhost."
        )

    def terminated(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminated)
    serve(storage, host, port, say=lambda text: click.echo(text, err=True))
