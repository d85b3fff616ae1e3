"""The rows of a run as its base reads them, and what a run, a plan and a sweep refuse of them before any weight is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamahome.config.load import LoadedConfig
from llamahome.config.schema import ModelConfig
from llamahome.conversation import base_of_run
from llamahome.data.prepare import Prepared
from llamahome.data.store.taught import Taught
from llamahome.data.text.tokenizer_files import tokenizer_folder, tokenizer_source
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.data_limits import prepare_fitted, warn_of_length
from llamahome.model.adapter import trained_rows
from llamahome.model.vocabulary import NewRows
from llamahome.objective_rows import one_kind, open_taught, refuse_other_rows
from llamahome.resolve import answers_to_score
from llamahome.starting_adapter import with_adapter


@dataclass(frozen=True)
class RunRows:
    """The rows of a run. The caller closes `prepared`."""

    fitted: LoadedConfig
    """The settings with which the rows were read: data.max_length is at most what the base can take."""
    prepared: Prepared
    tokenizer: ChatTokenizer


def read_rows(
    loaded: LoadedConfig, data_path: str | Sequence[str], base: Path, adapter: Path | None, *, say: Callable[[str], None]
) -> RunRows:
    """Prepare the rows for the model in `base`, or for the `adapter` on it that is trained further."""
    tokenizer = open_tokenizer(tokenizer_source(tokenizer_folder(base, adapter), loaded.config.model, trains=True))
    rows = trained_rows(adapter) if adapter is not None else 0
    return RunRows(*prepare_fitted(loaded, data_path, base, tokenizer, rows=rows, say=say), tokenizer)


def check_rows(rows: RunRows, base: Path, *, warn: Callable[[str, str], None]) -> Taught | None:
    """What a teacher says about the rows, if they are learned from it. Raises DataError or ConfigError for rows that cannot be learned."""
    config = rows.fitted.config
    warn_of_length(rows.fitted, base, rows.prepared.report.longest_tokens, warn=warn)
    refuse_other_rows(config, rows.prepared)
    if (found := one_kind(config, rows.prepared)) is not None:
        warn(*found)
    answers_to_score(rows.prepared, config, rows.tokenizer)
    return open_taught(config, rows.prepared, rows.tokenizer)


def new_rows(tokenizer: ChatTokenizer, model: ModelConfig) -> NewRows:
    """The rows that embedding and head need for the tokenizer of a run."""
    tokens = tokenizer.new_tokens
    needed = max(tokenizer.vocabulary.values()) + 1 if tokens or model.resize_embeddings else 0
    return NewRows(needed, {token.number: token.pieces for token in tokens})


def holds_out(loaded: LoadedConfig, data_path: str | Sequence[str], *, say: Callable[[str], None]) -> bool:
    """Whether a run with these settings has rows to evaluate on. Raises what reading the rows raises."""
    loaded, adapter = with_adapter(loaded, say=lambda _: None)
    rows = read_rows(loaded, data_path, base_of_run(loaded, say=say), adapter, say=say)
    rows.prepared.close()
    return rows.prepared.evaluation is not None
