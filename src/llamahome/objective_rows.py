"""What an objective asks of the rows of a run, checked before training: prompts, or what a teacher says about every row."""

import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llamahome.config.schema import Config
from llamahome.config.yamltext import write_value
from llamahome.data.prepare import Prepared
from llamahome.data.records import Example
from llamahome.data.store.table import ExampleTable
from llamahome.data.store.taught import Taught
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import ConfigError, DataError, Problem
from llamahome.training.answer_metric import FROM_TARGETS

_LOOKED_AT = 1_000_000
"""Examples that are looked up before training; measured: 7 us each with 300 tokens. The rest are looked up when they are read."""


def refuse_other_rows(config: Config, prepared: Prepared) -> None:
    """Raise DataError for rows that the objective cannot learn from, or whose held-out answers cannot be measured."""
    _refuse_texts(config, prepared)
    _refuse_unmeasured(config, prepared)


def _refuse_texts(config: Config, prepared: Prepared) -> None:
    """Texts have no prompts to answer."""
    if config.training.objective == "grpo" and prepared.reading.format_name == "text":
        message = "training.objective grpo answers prompts, and these rows are plain texts, which have none"
        hint = "rows with messages, or prompt and completion; the completion is the reference that the reward may read"
        raise DataError(Problem(code="data.no-prompts", message=message, where=prepared.reading.opened[0], hint=hint))


def _refuse_unmeasured(config: Config, prepared: Prepared) -> None:
    """Rows without answers, some of them held out, of which the answers are to be measured."""
    if prepared.reading.format_name == "prompts" and prepared.evaluation is not None and config.evaluation.metric in FROM_TARGETS:
        message = f"evaluation.metric {config.evaluation.metric} measures the answers of held-out rows, and these rows have none"
        hint = "--set data.eval_split=auto   holds none out; --set evaluation.metric=FILE.py:FUNCTION   scores what the model answers"
        raise DataError(Problem(code="evaluation.no-answers", message=message, where="evaluation.metric", hint=hint))


def one_kind(config: Config, prepared: Prepared) -> tuple[str, str] | None:
    """A warning and its consequence if kto has only good or only bad answers to learn from; of a stream, the first are looked at."""
    if config.training.objective != "kto":
        return None
    table = prepared.examples if isinstance(prepared.examples, ExampleTable) else prepared.first_examples(64)
    kinds = set(table.good.tolist())
    if len(kinds) != 1:
        return None
    kind, other = ("good", "bad") if kinds.pop() else ("bad", "good")
    consequence = f"nothing shows what is {other}, so the model only learns to give these answers more or less often"
    if kind == "good":
        consequence = "nothing shows what to avoid; training.objective sft learns good answers more directly"
    return f"all {len(table):,} answers are labelled {kind}", consequence


def open_taught(config: Config, prepared: Prepared, tokenizer: ChatTokenizer) -> Taught | None:
    """The folder of distill.teacher; None for other objectives. Raises DataError or ConfigError if it does not fit the rows."""
    if config.training.objective != "distill" or config.distill.teacher is None:
        return None
    taught = Taught(Path(config.distill.teacher))
    if taught.about.tokenizer != tokenizer.fingerprint:
        message = f"what {taught.about.teacher} said is about tokens of another tokenizer or chat template than the student's"
        changed = {key: value for key in ("new_tokens", "chat_template") if (value := getattr(config.model, key))}
        settings = "".join(f" --set {shlex.quote(f'model.{key}={write_value(value)}')}" for key, value in changed.items())
        hint = f"llamahome data teach DATA --model {config.model.name} --teacher {taught.about.teacher}{settings} --output NEW"
        raise ConfigError(Problem(code="model.other-tokenizer", message=message, where="distill.teacher", hint=hint))
    missing = taught.missing(islice(_trained(prepared), _LOOKED_AT))
    if missing is not None:
        raise DataError(taught.not_taught(missing))
    return taught


def _trained(prepared: Prepared) -> Iterator[Example]:
    """The examples that are known before training: all of them, or of a stream the first."""
    table = prepared.examples if isinstance(prepared.examples, ExampleTable) else prepared.first_examples(64)
    return (table.example(number) for number in range(len(table)))
