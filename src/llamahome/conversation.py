"""Talking to a model: what people mean by its name -> a function that answers a conversation, telling the answer as it appears."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llamahome.checkpoint import store
from llamahome.checkpoint.target import names_run, resolve
from llamahome.config.load import LoadedConfig
from llamahome.data.text.place import tokenizer_place
from llamahome.data.text.tokens import open_tokenizer
from llamahome.distributed.devices import device_here
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapter import base_of, is_adapter, open_trained
from llamahome.model.backends.choose import choose_backend
from llamahome.model.generate import generate
from llamahome.model.load import find_model
from llamahome.model.starter import STARTER
from llamahome.rundir import BASE_MODELS


def model_folder(target: str, loaded: LoadedConfig, *, say: Callable[[str], None]) -> Path:
    """The folder of a trained or base model that people mean: a run (its final model), a checkpoint, a model folder or a name."""
    for folder in (Path(target), Path(target) / "final", Path(target) / "model"):
        if is_adapter(folder) or (folder / "config.json").is_file():
            if is_adapter(folder):
                find_model(base_of(folder), say=say)
            return folder
    is_base = target == STARTER or (BASE_MODELS / target).is_dir()
    if not is_base and names_run(target):
        paths, checkpoint = resolve(target)
        return paths.final if paths.final.is_dir() else (checkpoint or store.choose(paths, warn=lambda _: None)) / store.MODEL
    try:
        return find_model(target, revision=loaded.config.model.revision, say=say)
    except ConfigError as error:
        raise ConfigError([_as_argument(problem) for problem in error.problems]) from error


def _as_argument(problem: Problem) -> Problem:
    """What is told of the setting model.name, told of a model that stands alone on the command line."""
    if problem.code != "model.not-found":
        return problem
    near = (problem.hint or "").removeprefix("--model ")
    hint = f"{near}, or what `llamahome models list` and `llamahome runs list` show"
    return replace(problem, message=problem.message.replace("no model", "no run and no model"), where="MODEL", hint=hint)


def open_chat(
    target: str, loaded: LoadedConfig, *, say: Callable[[str], None], max_new_tokens: int, temperature: float
) -> Callable[[list[dict[str, str]], Callable[[str], None]], str]:
    """A function that answers a conversation: turns and a place to write to as the answer appears -> the answer."""
    folder = model_folder(target, loaded, say=say)
    tokenizer = open_tokenizer(tokenizer_place(folder, loaded.config.model))
    device = device_here(processor=loaded.config.model.backend == "cpu")
    precision = choose_backend(loaded.config, device).precision
    model = open_trained(folder, dtype=precision.storage, device=device, say=say)

    def reply(turns: list[dict[str, str]], write: Callable[[str], None]) -> str:
        told: list[int] = []
        written = 0

        def tell(ids: list[int]) -> None:
            nonlocal written
            told.extend(token for token in ids if token not in tokenizer.all_ends)
            text = tokenizer.decode(told)
            if not text.endswith("\ufffd"):  # half a character: the rest comes with the next token
                write(text[written:])
                written = len(text)

        ids = generate(
            model,
            [tokenizer.encode_prompt(turns)],
            end_ids=tokenizer.all_ends,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            tell=tell,
        )
        answer = tokenizer.decode(ids[0])
        write(answer[written:])
        return answer

    return reply
