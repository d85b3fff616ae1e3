"""Checks settings and rows against the limits of a model, in every command that reads rows for a model.

A table of positions caps data.max_length, so that rows cut there are counted like any other cut. A tokenizer with tokens that have no row
in the embedding is refused. One warning tells of rows longer than a rotary model was trained on.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llamahome.config.layers import PREFIX, STANDARD_FILES
from llamahome.config.load import AUTO, DEFAULT, LoadedConfig, with_values
from llamahome.config.objectives import ObjectiveName, learns_rows
from llamahome.data.prepare import Prepared, prepare
from llamahome.data.store.truncation import within_positions
from llamahome.data.text.end_tokens import end_setting
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import ConfigError, DataError, Problem
from llamahome.model.limits import ModelLimits, limits_of, lost_ids


def fit_to_model(
    loaded: LoadedConfig, folder: Path, tokenizer: ChatTokenizer, *, rows: int = 0, say: Callable[[str], None]
) -> LoadedConfig:
    """The settings with data.max_length at most the positions of the model in `folder`; a change is reported.

    `rows` is the size of the embedding that an adapter brings. Raises what hold_vocabulary raises.
    """
    limits = hold_vocabulary(loaded, folder, tokenizer, rows=rows, say=say)
    if tokenizer.new_tokens:  # the tokens themselves, because a resumed run does not read their file again
        new = [token.text for token in tokenizer.new_tokens]
        loaded = with_values(loaded, {"model.new_tokens": new}, origin=loaded.origins["model.new_tokens"])
    max_length = loaded.config.data.max_length
    if limits.positions is None or limits.positions >= max_length:
        return loaded
    why = f"this model has {limits.positions:,} positions; rows are cut there, and counted"
    say(f"data.max_length {max_length:,} -> {limits.positions:,}: {why}")
    return with_values(loaded, {"data.max_length": limits.positions}, origin=f"{AUTO}the model has {limits.positions:,} positions")


def hold_vocabulary(
    loaded: LoadedConfig, folder: Path, tokenizer: ChatTokenizer, *, rows: int = 0, say: Callable[[str], None]
) -> ModelLimits:
    """The limits of the model in `folder`; a line reports harmless ids of special tokens without a row in its embedding.

    `rows` is the size of the embedding that an adapter brings. Raises ConfigError when the weights have another number of rows than the
    config says, when the tokenizer has tokens without a row, or when no end token has a row.
    """
    limits = limits_of(folder)
    if limits.vocabulary is None:
        return limits
    if limits.table is not None:
        raise ConfigError(_other_vocabulary(limits, folder))
    needed, grows = rows_needed(tokenizer), loaded.config.model.resize_embeddings or bool(tokenizer.new_tokens)
    if not grows:
        refuse_unknown_tokens(limits, needed, folder, rows=rows)
    _hold_special(tokenizer, folder, max(limits.vocabulary, rows, needed if grows else 0), say=say)
    return limits


def _other_vocabulary(limits: ModelLimits, folder: Path) -> Problem:
    table = limits.table
    assert table is not None
    message = f"config.json says vocab_size {limits.vocabulary:,}, but {table.name} has {table.rows:,} rows in the weights' files"
    hint = f'"vocab_size": {table.rows} in {folder / "config.json"}, if these weights are the right ones' if table.alone else None
    return Problem(code="model.other-vocabulary", message=message, where=str(folder), hint=hint)


def _hold_special(tokenizer: ChatTokenizer, folder: Path, rows: int, *, say: Callable[[str], None]) -> None:
    """Report the ids of special tokens that have none of the `rows`; raise ConfigError if no end token has one."""
    lost = lost_ids(folder, rows)
    names = [f"{one.name} {one.number:,} ({one.place})" for one in lost]
    if tokenizer.pad_id is not None and tokenizer.pad_id >= rows:
        names.append(f"the tokenizer's padding token {tokenizer.pad_id:,}")
    if not names:
        return
    message = f"the embedding has {rows:,} rows, none of them for {', '.join(names)}"
    if any(one.name == "eos_token_id" for one in lost) and not any(number < rows for number in tokenizer.all_ends):
        why = f"{message}; the tokenizer names no end token either, so no answer would end"
        raise ConfigError(Problem(code="model.lost-end", message=why, where=str(folder), hint=end_setting(tokenizer)))
    say(f"warning: {message}: nothing here needs {'it' if len(names) == 1 else 'them'}, and a saved generation_config.json does without")


def prepare_fitted(
    loaded: LoadedConfig,
    data_path: str | Sequence[str],
    folder: Path,
    tokenizer: ChatTokenizer,
    *,
    rows: int = 0,
    say: Callable[[str], None],
) -> tuple[LoadedConfig, Prepared]:
    """The settings fitted to the model in `folder`, and the examples with these. Raises what fit_to_model and prepare raise.

    `rows` is the size of the embedding that an adapter brings.
    """
    fitted = fit_to_model(loaded, folder, tokenizer, rows=rows, say=say)
    name = None if _is_read_by_every_command(loaded.origins["model.name"]) else loaded.config.model.name
    with hints_within_positions(folder), hints_that_keep(fitted.config.training.objective), hints_that_name(name):
        prepared = prepare(fitted.config.data, data_path, tokenizer, say=say)
    return fitted, prepared if learns_rows(fitted.config.training.objective) else prepared.as_references()


def rows_needed(tokenizer: ChatTokenizer) -> int:
    """Rows of an embedding that has every token of the tokenizer, except control tokens that are refused in rows and never rendered."""
    rendered = (tokenizer.chat_template or "", tokenizer.eos_token or "", tokenizer.bos_token or "")
    unused = {text for text in tokenizer.control_tokens if not any(text in used for used in rendered)}
    return max((number for text, number in tokenizer.vocabulary.items() if text not in unused), default=-1) + 1


def refuse_unknown_tokens(limits: ModelLimits, needed: int, folder: Path, *, rows: int = 0) -> None:
    """Raise ConfigError when both the embedding and the `rows` that an adapter brings are fewer than `needed`."""
    if limits.vocabulary is None or needed <= max(limits.vocabulary, rows):
        return
    message = (
        f"the tokenizer has {needed:,} tokens, the embedding {limits.vocabulary:,} rows: the last {needed - limits.vocabulary:,} have none"
    )
    hint = "--set model.resize_embeddings=true gives them rows and trains these; or take the tokenizer that belongs to this model"
    raise ConfigError(Problem(code="model.tokenizer-too-large", message=message, where=str(folder), hint=hint))


def warn_of_length(loaded: LoadedConfig, folder: Path, longest: int, *, warn: Callable[[str, str], None]) -> None:
    """Warn when the longest row has more tokens than the model in `folder` was trained on."""
    limits, read = limits_of(folder), min(longest, loaded.config.data.max_length)
    if limits.trained_length is not None and read > limits.trained_length:
        message = f"rows of up to {read:,} tokens, but this model was trained on at most {limits.trained_length:,}"
        warn(message, f"tokens beyond that may be learned badly; --set data.max_length={limits.trained_length} cuts them")


@contextmanager
def hints_within_positions(folder: Path) -> Iterator[None]:
    """Remove from the data errors of this block the hints that exceed the positions of the model in `folder`."""
    try:
        yield
    except DataError as error:
        positions = limits_of(folder).positions
        raise DataError([within_positions(problem, positions) for problem in error.problems]) from error


@contextmanager
def hints_that_name(model: str | None) -> Iterator[None]:
    """Let the commands in the data errors of this block that read chats by the template of a model name this one; None: they know it."""
    try:
        yield
    except DataError as error:
        if model is None:
            raise
        raise DataError([_with_model(problem, model) for problem in error.problems]) from error


def _with_model(problem: Problem, model: str) -> Problem:
    if problem.code not in ("data.rendered-chat", "data.bad-rows") or problem.hint is None:
        return problem
    return replace(problem, hint=problem.hint.replace(" --fix ", f" --model {shlex.quote(model)} --fix "))


def _is_read_by_every_command(origin: str) -> bool:
    return origin == DEFAULT or origin.startswith((PREFIX, *map(str, STANDARD_FILES)))


@contextmanager
def hints_that_keep(objective: ObjectiveName) -> Iterator[None]:
    """In a run with an `objective` that was asked for, let help for rows with bad answers begin with what keeps it."""
    try:
        yield
    except DataError as error:
        if objective == "sft":
            raise
        raise DataError([_good_answers_first(problem) for problem in error.problems]) from error


def _good_answers_first(problem: Problem) -> Problem:
    other_objective, _, good = (problem.hint or "").partition("; ")
    return replace(problem, hint=f"{good}; {other_objective}") if problem.code == "data.preference" and good else problem
