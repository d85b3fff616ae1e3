"""doctor: whether this machine can train; needs only click, because it also runs where packages are missing."""

import json
import signal
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from llamahome.cli import options

if TYPE_CHECKING:
    from llamahome.doctor.checks import Check, Request
    from llamahome.doctor.probes import Probe

_FAILED = 4
_NAME_WIDTH = 22


@click.command(
    epilog=options.examples(
        "llamahome doctor",
        "llamahome doctor data/training/raw --model smollm2-135m-instruct",
        "llamahome doctor --quick --json",
        "llamahome doctor --num-nodes 2 --node-rank 1 --master-addr 10.0.0.1",
    )
)
@click.argument(
    "data_paths",
    metavar="[DATA_PATH]...",
    nargs=-1,
    callback=options.not_options,
    help="Rows for the two real steps; default: a few of the sample data.",
)
@options.model
@options.config_files
@options.num_nodes
@options.method
@options.assignments
@options.meeting
@click.option("--quick", is_flag=True, help="Leave out what takes seconds: rates, compiling, two processes, two steps.")
@click.option("--only", multiple=True, metavar="GROUP", help="Only this group, such as network; may be given again.")
@click.option("--network", is_flag=True, help="Also ask the hub for an answer.")
@click.option("--machine-root", default="/", hidden=True, help="The folder that contains proc, sys and dev.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options.pass_overrides
def doctor(
    overrides: options.Overrides,
    data_paths: tuple[str, ...],
    quick: bool,
    only: tuple[str, ...],
    network: bool,
    machine_root: str,
    as_json: bool,
) -> None:
    """Check machine, installation, settings and model, and name the command that mends what is wrong."""
    from llamahome.doctor.checks import summary
    from llamahome.doctor.watch import current_request, examine

    request = current_request(
        data=data_paths,
        files=tuple(str(path) for path in overrides.files),
        flags=overrides.flags,
        assignments=tuple(overrides.assignments),
        root=machine_root,
        slow=not quick,
        hub=network,
    )
    meets = any(key in overrides.flags for key in ("distributed.num_nodes", "distributed.master_addr", "distributed.node_rank"))
    probes = _wanted(request, meets, only)
    checks: list[Check] = []
    group = ""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that processes and files of the checks go, too
    with closing(examine(request, probes)) as found:  # closed also if the reader of the output has gone
        for name, check in found:
            checks.append(check)
            if not as_json:
                if name != group:
                    print(name if not group else f"\n{name}")
                    group = name
                _show(check)
    if as_json:
        parts = [{"name": each.name, "status": each.status, "detail": each.detail, "help": each.help} for each in checks]
        print(json.dumps({"checks": parts}))
    else:
        print(f"\n{summary(checks)}")
    if any(check.status == "FAIL" for check in checks):
        raise click.exceptions.Exit(_FAILED)


def _wanted(request: "Request", meets: bool, only: tuple[str, ...]) -> "list[Probe]":
    """The checks to do; raises UsageError for an unknown group, or if none is left."""
    from llamahome.doctor.probes import PROBES, wanted
    from llamahome.errors import Problem, UsageError

    groups = ", ".join(dict.fromkeys(probe.group for probe in PROBES))
    message, hint = "", "--only machine"
    try:
        chosen = wanted(request, nodes=meets, only=only)
        if not chosen:
            message = f"nothing is left to check of {', '.join(only)}: the machines meet with --num-nodes, the hub is asked with --network"
            hint = "--only network --network"
    except KeyError as error:
        message = f"{error.args[0]!r} is none of {groups}"
    if message:
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--only", hint=hint))
    return chosen


def _show(check: "Check") -> None:
    print(f"  {check.status}  {check.name:<{_NAME_WIDTH}}{check.detail}", flush=True)
    if check.help:
        print(f"        help: {check.help}", flush=True)
