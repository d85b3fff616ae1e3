"""`data teach`: stores what a teacher would say at every target of some rows, for training with `training.objective: distill`."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import click

from llamahome.cli import options
from llamahome.cli.train import importing_torch
from llamahome.units import many


@click.command(
    epilog=options.examples(
        "llamahome data teach chats.jsonl --teacher my-larger-model --output data/training/taught",
        "llamahome data teach chats.jsonl --teacher brisk-otter --output taught --top-k 64",
    )
)
@click.argument("data_paths", metavar="DATA...", nargs=-1, callback=options.not_options, required=True, help=options.DATA_HELP)
@click.option("--teacher", required=True, metavar="MODEL", help="A run, a model folder or a model's name, with the student's tokenizer.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write; an unfinished one is continued."
)
@click.option("--top-k", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens that are kept at each target.")
@options.setting("--model", "model.name", "The student, whose tokenizer and chat template are used")
@options.config_files
@options.assignments
@options.as_json
@options.debug
@options.pass_overrides
def teach(
    overrides: options.Overrides, data_paths: tuple[str, ...], teacher: str, output: Path, top_k: int, as_json: bool, debug: bool
) -> None:
    """Store a teacher's likeliest tokens at every target, for distillation."""
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_train
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=debug)
    loaded = overrides.load()
    options.check_settings(loaded)
    locate(list(data_paths), wanted=to_train(loaded.config.data))
    with importing_torch():
        from llamahome.teaching import AskedTeacher
        from llamahome.teaching import teach as write_lesson

    lesson = write_lesson(list(data_paths), loaded, AskedTeacher(teacher, output, top_k))
    if as_json:
        print(json.dumps({"folder": str(lesson.folder), **asdict(lesson.about)}))
        return
    about = lesson.about
    print(f"{many(about.targets, 'target')} of {many(about.examples, 'example')}, {many(about.top_k, 'token')} each, in {lesson.folder}")
    again = ["llamahome", "train", *data_paths, *overrides.typed()]
    print(f"next: {shlex.join([*again, '--set', 'training.objective=distill', '--set', f'distill.teacher={lesson.folder}'])}")
