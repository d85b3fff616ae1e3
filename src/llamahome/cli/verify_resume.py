"""`verify-resume`: the user's own proof that a killed run goes on bit for bit."""

import json
import sys
from pathlib import Path

import click

from llamahome.cli import options
from llamahome.cli.train import importing_torch

_OWN = ("--json", "--debug")
_STEPS = 8
_FEWEST = 3
"""A run that is killed after its first checkpoint and before its end."""


@click.command(
    epilog=options.examples(
        "llamahome verify-resume chats.jsonl",
        "llamahome verify-resume chats.jsonl --method full --world-size 2 --json",
    )
)
@click.argument(
    "data_paths", metavar="DATA_PATH...", nargs=-1, callback=options.not_options, required=True, help="The data that you train on."
)
@options.together(
    options.model,
    options.from_adapter,
    options.output,
    options.config_files,
    options.world_size,
    options.epochs,
    options.max_steps,
    options.method,
    options.eval_data,
    options.assignments,
)
@click.option(
    "--steps", type=click.IntRange(min=_FEWEST), help="Steps of each run, 8 by default; a third of the way the first checkpoint is saved."
)
@options.as_json
@options.debug
@options.pass_overrides
def verify_resume(overrides: options.Overrides, data_paths: tuple[str, ...], steps: int | None, as_json: bool, debug: bool) -> None:
    """Prove on this machine that a killed run goes on bit for bit.

    Trains a few steps undisturbed, trains them again and kills that run with SIGKILL, resumes it, and compares every tensor.
    The options are those of train: --max-steps is --steps, and --output is where the runs lie until the command ends.
    """
    from llamahome.cli.train import check_paths
    from llamahome.errors import CheckpointError, Problem
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=debug)
    loaded = overrides.load()
    options.check_settings(loaded)
    check_paths(loaded, list(data_paths))
    with importing_torch():
        from llamahome import verify_resume as proof

    words, config = _without_own(sys.argv[2:]), loaded.config
    typed = loaded.origins["training.max_steps"] in ("--max-steps", "--set")  # that of a settings file is for a whole training
    count = max(_FEWEST, steps or (config.training.max_steps if typed else None) or _STEPS)
    beside = None if config.output.dir is None else Path(config.output.dir).parent
    result = proof.verify_resume(words, steps=count, beside=beside, say=options.note)
    if as_json:
        shown = {"identical": result.identical, "tensors": result.tensors, "first_difference": result.first_difference}
        print(json.dumps({**shown, "steps": result.steps, "killed_after": result.killed_after, "resumed_from": result.resumed_from}))
        if not result.identical:
            raise click.exceptions.Exit(CheckpointError.exit_status)
        return
    if not result.identical:
        message = f"the resumed run differs from the undisturbed one: {result.first_difference}"
        if not result.deterministic:
            message += "; two undisturbed runs differ, too: this machine computes differently each time"
        raise CheckpointError(Problem(code="checkpoint.resume-differs", message=message))
    print(f"identical: {result.tensors:,} tensors of model and optimizer, and the position in the data, after {result.steps} steps")
    print(f"  killed with SIGKILL after step {result.killed_after}, resumed from step {result.resumed_from}")


def _without_own(words: list[str]) -> list[str]:
    """The arguments without those that `train` does not know."""
    kept, skip = [], False
    for word in words:
        if not skip and word not in (*_OWN, "--steps") and not word.startswith("--steps="):
            kept.append(word)
        skip = word == "--steps"
    return kept
