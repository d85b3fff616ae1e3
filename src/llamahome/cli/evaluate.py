"""train-eval: measures a model on rows, beside its base, and prints figures, differences and where the answers are."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from llamahome.cli import options
from llamahome.cli.train import importing_torch
from llamahome.errors import Problem, UsageError
from llamahome.units import many


@click.command(
    epilog=options.examples(
        "llamahome train-eval output/training/final data/eval/test.jsonl",
        "llamahome train-eval latest test.jsonl --metric exact --metric f1",
        "llamahome train-eval latest test.jsonl --metric mine.py:score --answers answers.md",
        "llamahome train-eval my-model test.jsonl --base smollm2-135m-instruct --json",
        "llamahome train-eval latest --tasks my-tasks:capitals",
    )
)
@click.argument("model", help="A run, a checkpoint, a model folder or a model's name.")
@click.argument("data_paths", metavar="DATA...", nargs=-1, callback=options.not_options, help=options.DATA_HELP)
@click.option(
    "--base", metavar="MODEL", help="Compare with this model, or with `none`; without it, with the base of the adapter or of the run."
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Generate answers and score them: exact, f1, rouge, json, or a function of yours as FILE.py:FUNCTION; may be given again.",
)
@click.option("--answers", type=click.Path(path_type=Path), metavar="FILE", help="Write all answers: .jsonl, .md, .csv or .html.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, help="Most tokens of an answer.")
@click.option("--rows", type=click.IntRange(min=1), metavar="COUNT", help="Only so many rows, chosen by content.")
@click.option("--tasks", multiple=True, metavar="NAMES", help="Tasks of lm-eval (extra `eval`), or your own as FOLDER:NAME.")
@options.config_files
@options.assignments
@options.as_json
@options.debug
@options.pass_overrides
def train_eval(
    overrides: options.Overrides,
    model: str,
    data_paths: tuple[str, ...],
    base: str | None,
    metrics: tuple[str, ...],
    answers: Path | None,
    max_new_tokens: int,
    rows: int | None,
    tasks: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Measure a model on rows: loss, perplexity, token accuracy, scores of its answers; beside its base."""
    from llamahome.data.files.locate import locate
    from llamahome.data.files.splits import to_measure
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=debug)
    loaded = overrides.load()
    if not data_paths and not tasks:
        raise UsageError(Problem(code="usage.command-line", message="Missing argument 'DATA...'.", hint="llamahome train-eval --help"))
    if not data_paths and (metrics or answers or rows):
        message = "--metric, --answers and --rows need DATA"
        raise UsageError(Problem(code="usage.command-line", message=message, hint="llamahome train-eval --help"))
    if data_paths:
        locate(list(data_paths), wanted=to_measure(loaded.config.data))
    with importing_torch():
        from llamahome import pipeline
        from llamahome.measuring import Asked

    asked = Asked(metrics, base=base, tasks=tasks, answers=answers, max_new_tokens=max_new_tokens, rows=rows)
    data = None if not data_paths else data_paths[0] if len(data_paths) == 1 else list(data_paths)
    result = pipeline.evaluate(model, data, loaded, asked)
    click.echo(json.dumps(result) if as_json else "\n".join(_lines(result, data_paths)))


def _lines(result: dict[str, Any], data_paths: tuple[str, ...]) -> list[str]:
    lines = []
    if data_paths:
        lines.append(f"{result['model']} on {many(result['rows'], 'row')} of {shlex.join(data_paths)} ({result['targets']:,} targets)")
    else:
        lines.append(result["model"])
    base = result["base"]
    if base:
        lines.append(f"{'':16}{'':>12}{'base':>12}  {base['model']}")
    if data_paths:
        lines += [
            _line("loss", [_number(side, "loss", "{:.4f}") for side in (result, base)], "nats per target"),
            _line("perplexity", [_number(side, "perplexity", "{:.2f}") for side in (result, base)], ""),
            _line("token accuracy", [_number(side, "token_accuracy", "{:.1%}") for side in (result, base)], ""),
        ]
    for name, value in result["metrics"].items():
        theirs = base.get("metrics", {}).get(name)
        lines.append(_line(name, [_score(name, value), _score(name, theirs)], ""))
    for name, each in result["difference"].items():
        lines.append(f"  {name.replace('_', ' ')}: {each['verdict']}")
    if result.get("answers"):
        lines.append(f"answers: {result['answers']}")
    return lines


def _line(name: str, values: list[str], unit: str) -> str:
    return f"  {name:14}{''.join(f'{value:>12}' for value in values if value)} {unit}".rstrip()


def _number(side: dict[str, Any], key: str, form: str) -> str:
    if not side or key not in side:
        return ""
    return "inf" if side[key] is None else form.format(side[key])


def _score(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name in ("exact", "f1", "rouge", "json", "json_equal") else f"{value:.4g}"
