"""What Python programs and notebooks call: train, evaluate, open_chat and export_model, as the commands do it.

Settings are those of load_config, by default of the current folder. Paths may be text or Path. Errors are LlamaHomeErrors.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamahome import pipeline
from llamahome.config.load import LoadedConfig, load_config
from llamahome.conversation import ChatModel
from llamahome.conversation import open_chat as open_model
from llamahome.errors import ConfigError, Problem
from llamahome.export import Exported, Wanted, export
from llamahome.model.sampling import Sampling
from llamahome.monitoring.progress import open_progress

Data = str | Path | Sequence[str | Path]
_FORMS = ("adapter", "merged", "gguf", "ollama")


class Chat:
    """A conversation with a model: each question sees the earlier ones and their answers."""

    def __init__(self, model: ChatModel, sampling: Sampling, *, system: str | None = None) -> None:
        self._model, self._sampling = model, sampling
        self.turns: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        """The conversation as messages: what a row of training data holds."""

    def ask(self, question: str) -> str:
        """The answer. Raises DataError if the template refuses the conversation, ConfigError if it is too long; it then stays as it was."""
        asked = [*self.turns, {"role": "user", "content": question}]
        answer = self._model.answer(self._model.encode(asked), self._sampling).text
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer


def train(data_path: Data, settings: LoadedConfig | None = None) -> pipeline.Result:
    """Train on one path or several, in one process, in a new run folder. Raises Stopped when it was asked to stop and has saved."""
    return pipeline.train(_texts(data_path), settings or load_config())


def evaluate(target: str | Path, data_path: Data, settings: LoadedConfig | None = None) -> dict[str, Any]:
    """Loss, perplexity and token accuracy of a model, run or checkpoint on every row of the data."""
    return pipeline.evaluate(os.fspath(target), _texts(data_path), settings or load_config())


def open_chat(
    target: str | Path,
    settings: LoadedConfig | None = None,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Chat:
    """A conversation with a run, a checkpoint, a model folder, a model's name or `latest`. Raises ConfigError if there is none."""
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    say = open_progress(sys.stderr, True).say
    return Chat(open_model(os.fspath(target), settings or load_config(), say=say), sampling, system=system)


def export_model(
    target: str | Path, to: str, *, quant: str | None = None, output: str | Path | None = None, settings: LoadedConfig | None = None
) -> Exported:
    """Export as `adapter`, `merged`, `gguf` or `ollama`. Raises ConfigError, MachineError or SaveFailed, and then leaves nothing behind."""
    if to not in _FORMS:
        raise ConfigError(Problem(code="export.unknown-form", message=f"{to!r} is not one of {', '.join(_FORMS)}", where="to"))
    say = open_progress(sys.stderr, True).say
    folder = Path(output) if output is not None else None
    return export(os.fspath(target), Wanted(to, quant, folder), loaded=settings or load_config(), say=say)


def _texts(data_path: Data) -> str | list[str]:
    """The path or paths as the commands have them."""
    return os.fspath(data_path) if isinstance(data_path, str | Path) else [os.fspath(path) for path in data_path]
