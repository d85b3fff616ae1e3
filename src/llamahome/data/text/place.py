"""From what a tokenizer is opened: a model folder and the settings that change how it writes and ends chats."""

from pathlib import Path
from typing import Literal, NamedTuple

from llamahome.config.schema import ModelConfig

SystemRole = Literal["auto", "turn", "merge"]


class TokenizerPlace(NamedTuple):
    """What `open_tokenizer` of data/text/tokens.py takes, also in another process."""

    folder: str
    chat_template: str | None = None
    """model.chat_template."""
    eos_token: str | None = None
    """model.eos_token."""
    system_role: SystemRole = "auto"
    """model.system_role."""


def tokenizer_place(folder: Path | str, model: ModelConfig) -> TokenizerPlace:
    """The tokenizer of a model folder with what the settings say of it."""
    return TokenizerPlace(str(folder), model.chat_template, model.eos_token, model.system_role)
