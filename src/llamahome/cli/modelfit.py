"""What commands that look at rows ask of the model whose tokenizer they use: its positions, and the length it was trained on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llamahome.rundir import BASE_MODELS

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig
    from llamahome.config.schema import ModelConfig
    from llamahome.data.checks.compare import Side
    from llamahome.data.text.place import TokenizerPlace
    from llamahome.data.text.tokens import ChatTokenizer


def fitted(loaded: "LoadedConfig", tokenizer: "TokenizerPlace", opened: "ChatTokenizer | None" = None) -> "LoadedConfig":
    """The settings as far as the model goes whose folder and template these are; a folder of a tokenizer alone has no limits."""
    from llamahome.data.text.tokens import open_tokenizer
    from llamahome.data_limits import fit_to_model

    folder = Path(tokenizer[0])
    if not (folder / "config.json").is_file():
        return loaded
    return fit_to_model(loaded, folder, opened or open_tokenizer(tokenizer), say=lambda line: print(line, file=sys.stderr))


def warn_of_length(loaded: "LoadedConfig", tokenizer: "TokenizerPlace", sides: list["Side"]) -> None:
    """Warn of usable rows that are longer than the model was trained on."""
    from llamahome import data_limits

    folder = Path(tokenizer[0])
    longest = max((int(side.facts.tokens[side.facts.usable].max()) for side in sides if side.facts.usable.any()), default=0)
    if (folder / "config.json").is_file():
        data_limits.warn_of_length(loaded, folder, longest, warn=lambda message, why: print(f"warning: {message}: {why}", file=sys.stderr))


def positions_of(tokenizer: "TokenizerPlace | None") -> int | None:
    """Positions of the model, None where it has no table of them or is not known."""
    from llamahome.model.limits import limits_of

    known = tokenizer is not None and (Path(tokenizer[0]) / "config.json").is_file()
    return limits_of(Path(tokenizer[0])).positions if known and tokenizer is not None else None


def tokenizer_of(model: "ModelConfig") -> "TokenizerPlace":
    """The folder that holds the tokenizer, with its settings; model/ (and torch) is imported only when the model is not there yet."""
    from llamahome.data.text.place import tokenizer_place

    for folder in (Path(model.name).expanduser(), BASE_MODELS / model.name):
        if (folder / "tokenizer.json").is_file():
            return tokenizer_place(folder, model)
    from llamahome.model.load import find_model

    return tokenizer_place(find_model(model.name, revision=model.revision, say=lambda text: typer.echo(text, err=True)), model)
