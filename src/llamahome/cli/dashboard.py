"""`dashboard` shows runs in the browser, and starts them there if it is asked to. Imports no torch."""

import secrets
import sys
import threading
from contextlib import ExitStack
from urllib.parse import urlencode

import click

from llamahome.cli import options


@click.command(epilog=options.examples("llamahome dashboard", "llamahome dashboard --port 0", "llamahome dashboard --allow-start"))
@click.option("--port", type=click.IntRange(0, 65535), default=8700, help="0 picks a free one.")
@click.option("--host", default="127.0.0.1", help="Address to listen on; one beyond this machine needs --token.")
@click.option("--token", metavar="TOKEN", help="Show pages only to browsers that have this token: at least 12 characters.")
@click.option(
    "--allow-start", is_flag=True, help="Start, stop and resume trainings in the browser; prints a token unless --token is given."
)
def dashboard(port: int, host: str, token: str | None, allow_start: bool) -> None:
    """See every run in the browser: curves as they grow, samples, rows, the machine, runs compared.

    It only reads files, so no training notices when it is started, closed or killed. Ctrl-C ends it; trainings that were started with
    --allow-start go on.
    """
    from llamahome.errors import Problem, UsageError
    from llamahome.web.access import Access
    from llamahome.web.listen import open_socket, serve, url_of

    if token is not None and (len(token) < 12 or not token.isascii() or not token.isprintable() or " " in token):
        message = "a token is at least 12 printable ASCII characters without spaces"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--token", hint=f"--token {secrets.token_urlsafe(16)}"))
    opened = open_socket(host, port, key=token, option="--token")
    if allow_start and token is None:
        token = secrets.token_urlsafe(24)
    with opened, ExitStack() as closing:
        from llamahome.dashboard.app import make_app

        stop = threading.Event()
        app = make_app(Access(host, opened.getsockname()[1], token), stop, start=closing if allow_start else None)
        url = url_of(opened, host)
        if token is not None:
            print(f"open {url}/?{urlencode({'token': token})}", file=sys.stderr, flush=True)
        serve(app, opened, ready=lambda: print(f"listening on {url}", flush=True), stop=stop.set)
