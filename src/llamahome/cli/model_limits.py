"""Limits of the base model for the `data` commands: which tokenizer it has, its positions, and the length it was trained on."""

from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.cli import options
from llamahome.config.objectives import learns_rows
from llamahome.rundir import BASE_MODELS

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig
    from llamahome.config.schema import ModelConfig
    from llamahome.data.checks.compare import Side
    from llamahome.data.prepare import Prepared
    from llamahome.data.text.tokenizer_files import TokenizerSource
    from llamahome.data.text.tokens import ChatTokenizer


def find_tokenizer(model: "ModelConfig") -> "TokenizerSource":
    """The folder that holds the tokenizer, with its settings. Imports model/ (and torch) only to fetch a model that is not here yet."""
    from llamahome.data.text.tokenizer_files import tokenizer_source

    for folder in (Path(model.name).expanduser(), BASE_MODELS / model.name):
        if (folder / "tokenizer.json").is_file():
            return tokenizer_source(folder, model, trains=True)
    from llamahome.model.load import find_model

    folder = find_model(model.name, revision=model.revision, say=options.note)
    return tokenizer_source(folder, model, trains=True)


def fit_settings(loaded: "LoadedConfig", source: "TokenizerSource", tokenizer: "ChatTokenizer | None" = None) -> "LoadedConfig":
    """The settings with data.max_length and the like lowered to the model's limits; unchanged for a tokenizer without a model."""
    from llamahome.data.text.tokens import open_tokenizer
    from llamahome.data_limits import fit_to_model

    folder = _model_folder(source)
    if folder is None:
        return loaded
    return fit_to_model(loaded, folder, tokenizer or open_tokenizer(source), say=options.note)


def prepare_rows(loaded: "LoadedConfig", paths: list[str]) -> "Prepared":
    """The examples of `paths` within the limits of the model, as a run of training has them; the caller closes them."""
    from llamahome import data_limits
    from llamahome.data.prepare import prepare
    from llamahome.data.text.tokens import open_tokenizer

    source = find_tokenizer(loaded.config.model)
    tokenizer, folder = open_tokenizer(source), _model_folder(source)
    if folder is None:
        prepared = prepare(loaded.config.data, paths, tokenizer, say=options.note)
        return prepared if learns_rows(loaded.config.training.objective) else prepared.as_references()
    fitted, prepared = data_limits.prepare_fitted(loaded, paths, folder, tokenizer, say=options.note)
    data_limits.warn_of_length(fitted, folder, prepared.report.longest_tokens, warn=_warn)
    return prepared


def warn_of_length(loaded: "LoadedConfig", source: "TokenizerSource", sides: list["Side"]) -> None:
    """Warn if usable rows are longer than the rows that the model was trained on."""
    from llamahome import data_limits

    longest = max((int(side.facts.tokens[side.facts.usable].max()) for side in sides if side.facts.usable.any()), default=0)
    if folder := _model_folder(source):
        data_limits.warn_of_length(loaded, folder, longest, warn=_warn)


def positions_of(source: "TokenizerSource | None") -> int | None:
    """The number of positions that the model has, or None if it has no table of positions or there is no model."""
    from llamahome.model.limits import limits_of

    folder = _model_folder(source) if source is not None else None
    return limits_of(folder).positions if folder is not None else None


def _warn(message: str, why: str) -> None:
    options.note(f"warning: {message}: {why}")


def _model_folder(source: "TokenizerSource") -> Path | None:
    """The folder of the tokenizer if it also holds a model."""
    folder = Path(source[0])
    return folder if (folder / "config.json").is_file() else None
