"""Holds the limits of a model against the settings and the rows, in every command that reads rows for a model.

A table of positions caps data.max_length, so that what is cut is counted like any other cut; a tokenizer with tokens that have no row in
the embedding is refused; rows longer than a rotary model was trained on are warned of once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llamahome.config.load import LoadedConfig, with_values
from llamahome.data.checks.losses import within_positions
from llamahome.data.prepare import Prepared, prepare
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import ConfigError, DataError, Problem
from llamahome.model.limits import ModelLimits, limits_of


def fit_to_model(
    loaded: LoadedConfig, folder: Path, tokenizer: ChatTokenizer, *, rows: int = 0, say: Callable[[str], None]
) -> LoadedConfig:
    """The settings with data.max_length as far as the model in `folder` goes; what changes is said.

    `rows` of its embedding come with an adapter, if it has fewer. Raises ConfigError when rows can hold tokens without a row there.
    """
    limits = limits_of(folder)
    if not loaded.config.model.resize_embeddings:
        refuse_unknown_tokens(limits, rows_needed(tokenizer), folder, rows=rows)
    wanted = loaded.config.data.max_length
    if limits.positions is None or limits.positions >= wanted:
        return loaded
    told = f"this model has {limits.positions:,} positions; rows are cut there, and counted"
    say(f"data.max_length {wanted:,} -> {limits.positions:,}: {told}")
    return with_values(loaded, {"data.max_length": limits.positions}, origin=f"the model has {limits.positions:,} positions")


def prepare_fitted(
    loaded: LoadedConfig, data_path: str | Sequence[str], folder: Path, tokenizer: ChatTokenizer, *, say: Callable[[str], None]
) -> tuple[LoadedConfig, Prepared]:
    """The settings as far as the model in `folder` goes, and the examples under these. Raises what fit_to_model and prepare raise."""
    fitted = fit_to_model(loaded, folder, tokenizer, say=say)
    with within_reach(folder):
        return fitted, prepare(fitted.config.data, data_path, tokenizer, say=say)


def rows_needed(tokenizer: ChatTokenizer) -> int:
    """Rows of an embedding for every token that a row can hold; control tokens that neither template nor ends use are refused in rows."""
    written = (tokenizer.chat_template or "", tokenizer.eos_token or "", tokenizer.bos_token or "")
    unused = {text for text in tokenizer.control_tokens if not any(text in used for used in written)}
    return max((number for text, number in tokenizer.vocabulary.items() if text not in unused), default=-1) + 1


def refuse_unknown_tokens(limits: ModelLimits, needed: int, folder: Path, *, rows: int = 0) -> None:
    """ConfigError when the embedding has fewer than the `needed` rows, and fewer `rows` come with an adapter."""
    if limits.vocabulary is None or needed <= max(limits.vocabulary, rows):
        return
    message = (
        f"the tokenizer has {needed:,} tokens, the embedding {limits.vocabulary:,} rows: the last {needed - limits.vocabulary:,} have none"
    )
    hint = "--set model.resize_embeddings=true gives them rows and trains these; or take the tokenizer that belongs to this model"
    raise ConfigError(Problem(code="model.tokenizer-too-large", message=message, where=str(folder), hint=hint))


def warn_of_length(loaded: LoadedConfig, folder: Path, longest: int, *, warn: Callable[[str, str], None]) -> None:
    """Warn once when the longest row that is read has more tokens than the model in `folder` was trained on."""
    limits, read = limits_of(folder), min(longest, loaded.config.data.max_length)
    if limits.trained_length is not None and read > limits.trained_length:
        message = f"rows of up to {read:,} tokens, but this model was trained on at most {limits.trained_length:,}"
        warn(message, f"what stands beyond may be learned badly; --set data.max_length={limits.trained_length} cuts it")


@contextmanager
def within_reach(folder: Path) -> Iterator[None]:
    """Data errors of this block without help that the model in `folder` cannot follow."""
    try:
        yield
    except DataError as error:
        positions = limits_of(folder).positions
        raise DataError([within_positions(problem, positions) for problem in error.problems]) from error


def refuse_sharded(why_alone: str | None, new_rows: Sequence[int]) -> None:
    """ConfigError where processes cannot hold the weights of a model together.

    Sharded weights come together equally often on all processes, so each must have as many passes; and trained rows would lie in a weight
    of which each process holds a part.
    """
    why = f"documents of this model run one at a time: {why_alone}" if why_alone is not None else None
    if new_rows:
        why = "new rows of the embedding are trained"
    if why is not None:
        hint = "--set distributed.strategy=replicate"
        message = f"weights cannot be sharded, because {why}"
        raise ConfigError(Problem(code="distributed.cannot-shard", message=message, where="distributed.strategy", hint=hint))
