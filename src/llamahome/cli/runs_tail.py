"""`llamahome runs tail`: the panel of a run that trains elsewhere. Only reads files, and imports no torch."""

import json
import os
import sys
import time
from typing import TYPE_CHECKING

import click

from llamahome.cli import options

if TYPE_CHECKING:
    from llamahome.monitoring.follow import ViewClock
    from llamahome.monitoring.progress import Progress
    from llamahome.rundir import RunPaths

_POLL_SECONDS = 1.0


@click.command(
    epilog=options.examples("llamahome runs tail", "llamahome runs tail otter", "llamahome runs tail latest --json | grep train/loss")
)
@click.argument("run", required=False, default="latest", help="A run id or a part of it, a run's folder, or `latest`.")
@click.option("--json", "as_json", is_flag=True, help="Print every record of the run as a line of JSON.")
def tail(run: str, as_json: bool) -> None:
    """Watch a run until it ends, from any terminal; after its end, how it ended. Ctrl-C closes the view and leaves the run alone."""
    from llamahome.monitoring.runs import find_run

    paths = find_run(run, typed=("tail",))
    try:
        (_print_records if as_json else _watch)(paths)
    except KeyboardInterrupt:
        from llamahome.known_runs import to_type

        click.echo(f"the run is left alone; to see it again: llamahome runs tail {to_type(paths)}", err=True)


def _watch(paths: "RunPaths") -> None:
    from llamahome.monitoring.follow import Follower

    on_terminal = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    follower = Follower(paths, _open_panel if on_terminal else _open_lines, plain=not on_terminal)
    try:
        while not follower.is_over(info := follower.poll()):
            time.sleep(_POLL_SECONDS)
        follower.poll()  # what was written between the last look and the end
        follower.finish(info)
    finally:
        follower.close()


def _open_panel(clock: "ViewClock") -> "Progress":
    from llamahome.monitoring.panel import PanelProgress

    return PanelProgress(sys.stdout, now=clock, hints=[("leave", "Ctrl-C closes this view; the run goes on")])


def _open_lines(clock: "ViewClock") -> "Progress":
    from llamahome.monitoring.plain import PlainProgress

    return PlainProgress(sys.stdout, now=clock)


def _print_records(paths: "RunPaths") -> None:
    """One line for each record, and at the end one for the state of the run."""
    from llamahome.monitoring.follow import Files, records_of
    from llamahome.monitoring.runs import describe_run

    files, alive = Files(paths), True
    while alive:
        info = describe_run(paths)
        for record in records_of(files):
            click.echo(json.dumps(record, ensure_ascii=False))
        sys.stdout.flush()
        alive = info.state == "running"
        if alive:
            time.sleep(_POLL_SECONDS)
    click.echo(json.dumps({"kind": "state", "state": info.state, "step": info.step, "horizon": info.horizon}))
