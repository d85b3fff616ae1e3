"""`checkpoint list | verify | prune`: what a run has saved, whether every byte is as it was written, and what to delete. No torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamahome.cli import options

if TYPE_CHECKING:
    from llamahome.checkpoint.listing import Listed
    from llamahome.errors import Problem
    from llamahome.rundir import RunPaths

_RUN = "A run: its folder, its id or a part of it, or `latest`."


@click.group(cls=options.Group, no_args_is_help=True)
def checkpoint_app() -> None:
    """List, verify and prune checkpoints."""


@checkpoint_app.command("list")
@click.argument("run", help=_RUN)
@options.as_json
def list_command(run: str, as_json: bool) -> None:
    """List what a run has saved; half-written, damaged and foreign checkpoints are named."""
    from llamahome.checkpoint.listing import list_checkpoints
    from llamahome.rundir import nearby

    paths = _run_of(run)
    listed = list_checkpoints(paths)
    if as_json:
        click.echo(json.dumps({"run": paths.run_id, "path": str(nearby(paths.root)), "checkpoints": [_as_json(each) for each in listed]}))
        return
    if not listed:
        click.echo(f"{nearby(paths.root)}: no checkpoint")
    for line in _table(listed) if listed else ():
        click.echo(line)


@checkpoint_app.command(
    "verify", epilog=options.examples("llamahome checkpoint verify latest", "llamahome checkpoint verify output/training/checkpoint-40")
)
@click.argument("path", help="A checkpoint, or a run: then all of its checkpoints.")
@options.as_json
def verify_command(path: str, as_json: bool) -> None:
    """Read every byte of a checkpoint and compare it with what was written. The exit status is 7 if anything differs."""
    from dataclasses import asdict, replace

    from llamahome.checkpoint import manifest
    from llamahome.checkpoint.listing import list_checkpoints
    from llamahome.checkpoint.target import resume_older
    from llamahome.errors import CheckpointError, Problem
    from llamahome.rundir import as_typed, nearby
    from llamahome.units import many, show_bytes

    folder = _checkpoint_folder(path)
    if folder is not None:
        problems = manifest.verify(folder)
        verified = [] if problems else [folder]
    else:
        paths = _run_of(path)
        folder = paths.root
        listed = [each for each in list_checkpoints(paths, check=manifest.verify) if each.kind not in ("half-written", "being removed")]
        problems = [problem for each in listed for problem in each.problems]
        verified = [each.path for each in listed if not each.problems]
        if not listed:
            problems = [Problem(code="checkpoint.none", message="the run has no checkpoint yet", where=str(nearby(folder)))]
    if as_json:
        shown = {"path": str(nearby(folder)), "valid": not problems, "problems": [asdict(problem) for problem in problems]}
        click.echo(json.dumps({**shown, "verified": [str(nearby(each)) for each in verified]}))
        if problems:
            raise click.exceptions.Exit(CheckpointError.exit_status)
        return
    for each in verified:
        record = manifest.read(each)
        click.echo(f"{nearby(each)}: intact, {many(len(record.files), 'file')}, {show_bytes(record.total_bytes)}")
    if problems:
        last = problems[-1]
        hint = last.hint or (f"llamahome train-resume {as_typed(verified[-1])}" if verified else resume_older(folder))
        raise CheckpointError([*problems[:-1], replace(last, hint=hint)])


@checkpoint_app.command(
    "prune",
    epilog=options.examples("llamahome checkpoint prune latest --keep-last 1 --keep-best 0 --dry-run"),
)
@click.argument("run", help=_RUN)
@click.option("--keep-last", type=click.IntRange(min=1), help="Keep the newest ones; by default as many as the run's checkpoint.keep_last.")
@click.option("--keep-best", type=click.IntRange(min=0), help="Keep the best ones; by default as many as the run's checkpoint.keep_best.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@options.as_json
def prune_command(run: str, keep_last: int | None, keep_best: int | None, dry_run: bool, as_json: bool) -> None:
    """Delete old checkpoints of a run and what crashes left half-written; the newest intact one always stays."""
    from llamahome import durable
    from llamahome.checkpoint import retention
    from llamahome.checkpoint.listing import list_checkpoints
    from llamahome.config.load import read_saved_config
    from llamahome.errors import Problem
    from llamahome.monitoring.in_use import require_idle
    from llamahome.rundir import nearby
    from llamahome.units import many, parse_interval, show_bytes

    paths, itself = _run_of(run), "it prunes its checkpoints itself"
    require_idle(paths, itself)
    config = read_saved_config(paths.config).config.checkpoint
    keep = {
        "keep_last": config.keep_last if keep_last is None else keep_last,
        "keep_best": config.keep_best if keep_best is None else keep_best,
    }
    ages = [parse_interval(age).value for age in config.keep_ages]
    problems: list[Problem] = []
    steps = set(retention.deletable(paths, **keep, keep_ages=ages, warn=problems.append))
    listed = list_checkpoints(paths)
    doomed = [each for each in listed if each.kind in ("half-written", "being removed") or (each.step in steps and each.kind == "whole")]
    if not dry_run:
        require_idle(paths, itself)  # a resume may have begun while the newest checkpoint was verified
        for each in doomed:  # renamed first, so that a save that writes there cannot commit what is left
            _delete(each.path, durable.remove_tree if each.kind == "being removed" else durable.remove_folder)
    freed = sum(each.bytes for each in doomed)
    if as_json:
        kept = [str(nearby(each.path)) for each in listed if each not in doomed]
        click.echo(json.dumps({"deleted": [str(nearby(each.path)) for each in doomed], "kept": kept, "bytes": freed, "dry_run": dry_run}))
        return
    for problem in problems:
        click.echo(problem.render(level="warning"), err=True)
    for each in doomed:
        click.echo(f"{nearby(each.path)}: {each.kind}, {show_bytes(each.bytes)}")
    verb = "would be deleted" if dry_run else "deleted"
    click.echo(f"{many(len(doomed), 'folder')} {verb}, {show_bytes(freed)}; {many(len(listed) - len(doomed), 'folder')} kept")


def _delete(folder: Path, remove: Callable[[Path], None]) -> None:
    from llamahome.errors import MachineError, Problem

    try:
        remove(folder)
    except OSError as error:
        message = f"cannot be deleted: {error.strerror}"
        raise MachineError(Problem(code="machine.cannot-write", message=message, where=str(folder))) from error


def _run_of(target: str) -> "RunPaths":
    """The run that `target` names. The help for another name only lists: neither prune nor train-resume must be one paste away."""
    from llamahome.checkpoint.target import resolve

    return resolve(target, command="llamahome checkpoint list")[0]


def _checkpoint_folder(target: str) -> Path | None:
    """The folder if `target` is one that is not a run: its name says checkpoint, or it holds a manifest."""
    from llamahome.checkpoint import manifest

    folder = Path(target)
    return folder if folder.is_dir() and ((folder / manifest.NAME).exists() or "checkpoint-" in folder.resolve().name) else None


def _table(listed: list["Listed"]) -> list[str]:
    from llamahome.checkpoint.listing import best_of
    from llamahome.units import aligned, show_bytes, show_time

    header = ("checkpoint", "state", "held-out", "size", "written")
    best = best_of(listed)
    rows = [
        (
            each.path.name,
            each.kind + (", best" if each is best else ""),
            "-" if each.state is None or each.state.eval_loss is None else f"{each.state.eval_loss:.4f}",
            show_bytes(each.bytes),
            show_time(each.written),
        )
        for each in listed
    ]
    return aligned([header, *rows]) + [f"{each.path.name}: {problem.message}" for each in listed for problem in each.problems]


def _as_json(listed: "Listed") -> dict[str, Any]:
    from llamahome.rundir import nearby

    problems: list[Problem] = listed.problems
    return {
        "path": str(nearby(listed.path)),
        "state": listed.kind,
        "step": listed.step,
        "bytes": listed.bytes,
        "written": listed.written,
        "eval_loss": None if listed.state is None else listed.state.eval_loss,
        "trained_s": None if listed.state is None else listed.state.elapsed_s,
        "problems": [problem.message for problem in problems],
    }
