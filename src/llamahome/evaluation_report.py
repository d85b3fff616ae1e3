"""What `train-eval` reports: figures of a model and of its base, scores of answers, differences with a verdict, and the file of answers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamahome.answers_file import check_answers_path, default_answers_path, write_answers
from llamahome.comparison import NATS, POINTS, SCORE, Difference, compare
from llamahome.config.load import LoadedConfig
from llamahome.config.objectives import FORMAT_OF, LEARNS
from llamahome.conversation import model_folder
from llamahome.data.files.sources import open_source
from llamahome.data.files.splits import to_measure
from llamahome.data.records import Row
from llamahome.data.rows.detect import SAMPLE
from llamahome.data.rows.judged import find_judged, judged_problem
from llamahome.data.rows.prompts import why_prompts
from llamahome.distributed.standing import READ
from llamahome.errors import ConfigError, DataError, Problem
from llamahome.lm_eval_tasks import open_tasks, run_tasks
from llamahome.measuring import Asked, Measured, RowsRead, find_compared, measure_both, read_rows_for
from llamahome.rundir import nearby, run_of
from llamahome.session import Session
from llamahome.training.scores import Metric, is_json_container, open_metric
from llamahome.units import many


def report(target: str, data_path: str | Sequence[str] | None, loaded: LoadedConfig, asked: Asked, session: Session) -> dict[str, Any]:
    """Measure `target` on every row of `data_path`, and on the tasks of lm-eval; the result is what `train-eval --json` prints.

    Everything that can be refused is refused before the model is loaded.
    """
    say = session.progress.say
    if data_path is not None:
        _refuse_judged(data_path, loaded)
    metrics = _open_metrics(asked.metrics)
    tasks = open_tasks(asked.tasks) if asked.tasks else None
    if asked.answers is not None:
        check_answers_path(asked.answers)
    folder = model_folder(target, loaded, say=say)
    compared = find_compared(folder, loaded, asked, session)
    result: dict[str, Any] = {"model": str(nearby(folder)), "data": data_path}
    if data_path is None:
        result |= {"metrics": {}, "base": {"model": str(nearby(compared)), "metrics": {}} if compared else {}, "difference": {}}
    else:
        result |= _on_rows(
            folder, compared, data_path, loaded, replace(asked, answers=_answers_path(folder, data_path, asked)), metrics, session
        )
    if tasks is not None:
        with session.progress.phase("tasks"):
            result["metrics"].update(run_tasks(tasks, folder, loaded, device=session.world.device, say=say))
            if compared is not None:
                result["base"]["metrics"].update(run_tasks(tasks, compared, loaded, device=session.world.device, say=say))
    return result


def _refuse_judged(data_path: str | Sequence[str], loaded: LoadedConfig) -> None:
    """Raise ConfigError if the rows hold bad answers beside good ones, or are to be read so: one good answer to each prompt is measured."""
    data, objective = loaded.config.data, loaded.config.training.objective
    source = open_source(data_path, wanted=to_measure(data))
    parsed = (source.parsed(number) for number in range(min(SAMPLE, len(source))))
    rows = [each for each in parsed if isinstance(each, Row)]
    if data.format == "prompts" and why_prompts(rows, data.columns):
        message = "these rows have prompts and no answers, and train-eval measures answers"
        raise DataError(Problem(code="evaluation.no-answers", message=message, where=rows[0].where, hint="add a good answer to each"))
    row, found = find_judged(rows, data.columns) or (next(iter(rows), None), None)
    if row is None or (found is None and data.format not in FORMAT_OF.values()):
        return
    measures = "train-eval measures one good answer to each prompt; a run measures such rows itself where they are held out"
    if found is None:
        message, sft = f"training.objective {objective} reads other rows", "--set training.objective=sft   measures rows with one answer"
        raise ConfigError(Problem(code="config.eval-of-pairs", message=f"{message}, and {measures}", where=row.where, hint=sft))
    hint, plain = found.good, "" if LEARNS[objective] == "answers" else "--set training.objective=sft "
    if hint is not None:
        is_setting = hint.startswith("--set")
        hint = f"{plain}{hint}   measures the better answers" if is_setting else f"{hint}   writes the good answers, to measure them"
    raise ConfigError(judged_problem(row, found, code="config.eval-of-pairs", why=measures, hint=hint))


def _on_rows(
    folder: Path,
    compared: Path | None,
    data_path: str | Sequence[str],
    loaded: LoadedConfig,
    asked: Asked,
    metrics: list[Metric],
    session: Session,
) -> dict[str, Any]:
    """Everything that is measured on rows."""
    say = session.progress.say
    with session.phase("data", READ):
        rows = read_rows_for(folder, loaded, data_path, asked, session)
        metrics = _check_metrics(metrics, rows, data_path)
    model, base = measure_both(folder, compared, rows, loaded=loaded, data_path=data_path, asked=asked, session=session)
    sides = [model] if base is None else [model, base]
    try:
        for side in sides:
            _score(side, metrics)
    except ConfigError:
        _write(asked.answers, model, base, session)
        raise
    written, limit = _write(asked.answers, model, base, session), asked.max_new_tokens
    for name, side in zip(("", " of the base"), sides, strict=False):
        if side.cut:
            ended = f"{many(side.cut, 'answer')}{name} ended at {limit} tokens"
            say(f"{ended}; --max-new-tokens {2 * limit} allows more")
    figures, evaluation = model.figures(), model.evaluation
    old = {"eval/loss": figures["loss"], "eval/perplexity": figures["perplexity"], "eval/token_accuracy": figures["token_accuracy"]}
    counts = rows.stored.counts if asked.rows is None else None
    found: dict[str, Any] = {**figures, **old, "rows": counts.kept if counts else len(model.losses)}
    found |= {"tokens": len(rows.table.tokens), "targets": evaluation.targets}
    found["base"] = {"model": str(nearby(base.folder)), **base.figures()} if base is not None else {}
    found["difference"] = {name: each.as_json() for name, each in _differences(model, base, metrics).items()} if base is not None else {}
    if asked.generates:
        found |= {"answered": len(model.answers), "max_new_tokens": asked.max_new_tokens, "answers": str(written) if written else None}
    return found


def _open_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics, each once; two functions of one name are told apart by their file."""
    metrics: list[Metric] = []
    for name in dict.fromkeys(names):
        metric = open_metric(name)
        taken = any(metric.name == other.name for other in metrics)
        metrics.append(replace(metric, name=name) if taken else metric)
    return metrics


def _check_metrics(metrics: list[Metric], rows: RowsRead, data_path: str | Sequence[str]) -> list[Metric]:
    """The metrics, json with json_equal if a reference is JSON; a function is called once with the first reference as answer.

    Raises DataError if no row has an answer, ConfigError if a function fails.
    """
    questions = rows.questions.asked
    if metrics and not questions:
        typed = data_path if isinstance(data_path, str) else " ".join(data_path)
        message = "no row has an answer of the assistant, so there is nothing to generate and to score"
        raise DataError(Problem(code="evaluation.no-answers", message=message, where=typed))
    for metric in metrics:
        row = rows.stored.reading.source.row(questions[0].row)
        metric.score(questions[0].prompt, questions[0].reference, questions[0].reference, row=row.value, where=row.where)
    names = [metric.name for metric in metrics]
    if "json" in names and "json_equal" not in names and any(is_json_container(question.reference) for question in questions):
        metrics = [*metrics, open_metric("json_equal")]
    return metrics


def _answers_path(folder: Path, data_path: str | Sequence[str], asked: Asked) -> Path | None:
    """Where the answers are written; None: nowhere."""
    run = run_of(folder)
    if asked.answers is not None or not asked.generates or run is None:
        return asked.answers
    return default_answers_path(nearby(run), [data_path] if isinstance(data_path, str) else data_path)


def _write(path: Path | None, model: Measured, base: Measured | None, session: Session) -> Path | None:
    """Write the file of answers, on the main rank."""
    if path is None or not model.answers or not session.world.is_main:
        return None
    write_answers(path, _answer_rows(model, base))
    session.progress.say(f"answers: {path}")
    return path


def _score(measured: Measured, metrics: Sequence[Metric]) -> None:
    """Score the answers. Raises ConfigError if a function of the user's fails."""
    rows = measured.rows
    for metric in metrics:
        scores = {}
        for question in rows.questions.asked:
            row = rows.stored.reading.source.row(question.row)
            scores[question.row] = metric.score(
                question.prompt, measured.answers[question.row], question.reference, row=row.value, where=row.where
            )
        measured.scores[metric.name] = scores


def _differences(model: Measured, base: Measured, metrics: Sequence[Metric]) -> dict[str, Difference]:
    """Model minus base: of the loss and of token accuracy if both read the same tokens, and of each metric."""
    rows, found = model.rows, {}
    if base.rows is rows and model.losses:
        clusters = rows.clusters()
        numbers = list(model.losses)
        pairs = [(model.losses[number], base.losses[number]) for number in numbers]
        shared: dict[str, Any] = {"clusters": [clusters[n] for n in numbers], "weights": [pair[0].targets for pair in pairs]}
        sides = [[side.loss / side.targets for side in each] for each in zip(*pairs, strict=True)]
        found["loss"] = compare(sides[0], sides[1], unit=NATS, **shared)
        sides = [[side.correct / side.targets for side in each] for each in zip(*pairs, strict=True)]
        found["token_accuracy"] = compare(sides[0], sides[1], unit=POINTS, **shared)
    prompts = {question.row: question.tokens for question in rows.questions.asked}
    for metric in metrics:
        mine, theirs = model.scores[metric.name], base.scores[metric.name]
        numbers = [number for number in mine if number in theirs]
        values = [[side[number] for number in numbers] for side in (mine, theirs)]
        unit = POINTS if metric.is_share else SCORE
        found[metric.name] = compare(values[0], values[1], clusters=[prompts[number] for number in numbers], unit=unit)
    return found


def _answer_rows(model: Measured, base: Measured | None) -> list[dict[str, Any]]:
    """The rows of the file of answers; `row` and `source` are those of `data show`."""
    made, rows = [], model.rows
    for question in rows.questions.asked:
        number, place = question.row, rows.stored.reading.source.row(question.row)
        row: dict[str, Any] = {"source": place.source, "row": place.index, "prompt": question.prompt, "reference": question.reference}
        row["answer"] = model.answers[number]
        if base is not None and number in base.answers:
            row["base_answer"] = base.answers[number]
        for key, side in (("scores", model), ("base_scores", base)):
            scores = {name: values[number] for name, values in side.scores.items() if number in values} if side is not None else {}
            row |= {key: scores} if scores else {}
        made.append(row)
    return made
