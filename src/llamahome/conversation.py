"""Talking to a model: what people mean by its name -> a function that answers a conversation, telling the answer as it appears."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llamahome.checkpoint import store
from llamahome.checkpoint.target import names_run, resolve
from llamahome.config.load import LoadedConfig
from llamahome.data.prepare import Whole, read_all, report_of
from llamahome.data.text.place import tokenizer_place
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.data_limits import fit_to_model, warn_of_length, within_reach
from llamahome.distributed.devices import device_here
from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.model.adapter import find_base, is_adapter, open_trained, trained_rows
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import choose_backend
from llamahome.model.bases import base_is_gone
from llamahome.model.generate import generate, positions_of
from llamahome.model.load import CausalLM, find_model
from llamahome.model.packing import packing_of
from llamahome.model.starter import STARTER
from llamahome.rundir import BASE_MODELS


def model_folder(target: str, loaded: LoadedConfig, *, say: Callable[[str], None]) -> Path:
    """The folder of a trained or base model that people mean: a run (its final model), a checkpoint, a model folder or a name."""
    for folder in (Path(target), Path(target) / "final", Path(target) / "model"):
        if is_adapter(folder) or (folder / "config.json").is_file():
            if is_adapter(folder):
                find_base(folder, typed=typed_base(loaded), say=say)
            return folder
    is_base = target == STARTER or (BASE_MODELS / target).is_dir()
    if not is_base and names_run(target):
        paths, checkpoint = resolve(target)
        return paths.final if paths.final.is_dir() else (checkpoint or store.choose(paths, warn=lambda _: None)) / store.MODEL
    try:
        return find_model(target, revision=loaded.config.model.revision, say=say)
    except ConfigError as error:
        raise ConfigError([_as_argument(problem) for problem in error.problems]) from error


def typed_base(loaded: LoadedConfig) -> str | None:
    """model.name where it was typed with this very command: the base of an adapter, in the place of the one that its folder records."""
    return loaded.config.model.name if loaded.origins["model.name"] in ("--set", "--model") else None


def base_of_run(loaded: LoadedConfig, *, say: Callable[[str], None]) -> Path:
    """The folder of the base that a run trains. Raises what find_model raises; of a resumed run, that its base is gone."""
    name, origin = loaded.config.model.name, loaded.origins["model.name"]
    try:
        return find_model(name, revision=loaded.config.model.revision, say=say)
    except (ConfigError, MachineError) as error:
        if origin.startswith("saved: ") and error.problems[0].code in ("model.not-found", "model.hub-failed"):
            raise ConfigError(base_is_gone(name, "model.name in the run's config.yaml")) from error
        raise


def fit_to_trained(
    loaded: LoadedConfig, folder: Path, tokenizer: ChatTokenizer, *, say: Callable[[str], None]
) -> tuple[LoadedConfig, Path]:
    """The settings as far as the model in `folder` goes, which may be an adapter, and the folder of the weights whose limits these are."""
    weights = find_base(folder, typed=typed_base(loaded), say=say) if is_adapter(folder) else folder
    return fit_to_model(loaded, weights, tokenizer, rows=trained_rows(folder), say=say), weights


def read_fitted(
    loaded: LoadedConfig, data_path: str | Sequence[str], folder: Path, *, say: Callable[[str], None], warn: Callable[[str, str], None]
) -> tuple[LoadedConfig, Whole]:
    """Every row of `data_path` for the model in `folder`, as far as that goes, and the settings that say so."""
    tokenizer = open_tokenizer(tokenizer_place(folder, loaded.config.model))
    loaded, weights = fit_to_trained(loaded, folder, tokenizer, say=say)
    with within_reach(weights):
        rows = read_all(loaded.config.data, data_path, tokenizer, say=say)
    warn_of_length(loaded, weights, report_of(rows).longest_tokens, warn=warn)
    return loaded, rows


def _as_argument(problem: Problem) -> Problem:
    """What is told of the setting model.name, told of a model that stands alone on the command line."""
    hint = problem.hint
    if hint is not None and hint.startswith("--model "):
        hint = f"{hint.removeprefix('--model ')}, or what `llamahome models list` and `llamahome runs list` show"
    if problem.code != "model.not-found":
        return replace(problem, hint=hint)
    return replace(problem, message=problem.message.replace("no model", "no run and no model"), where="MODEL", hint=hint)


def _no_room(tokens: int, positions: int) -> Problem:
    message = f"the conversation has {tokens:,} tokens, and this model {positions:,} positions: none is left for an answer"
    return Problem(code="model.too-long", message=message, where="MODEL", hint="a shorter question, in a new conversation")


def open_to_measure(folder: Path, loaded: LoadedConfig, backend: Backend, device: torch.device, *, say: Callable[[str], None]) -> CausalLM:
    """The model in `folder` on `device`; how it computes documents is said where it is not in the usual way."""
    model = open_trained(folder, dtype=backend.precision.storage, device=device, say=say, base=typed_base(loaded))
    for line in packing_of(model).remarks():
        say(line)
    return model


def open_chat(
    target: str, loaded: LoadedConfig, *, say: Callable[[str], None], max_new_tokens: int, temperature: float
) -> Callable[[list[dict[str, str]], Callable[[str], None]], str]:
    """A function that answers a conversation: turns and a place to write to as the answer appears -> the answer."""
    folder = model_folder(target, loaded, say=say)
    tokenizer = open_tokenizer(tokenizer_place(folder, loaded.config.model))
    fit_to_trained(loaded, folder, tokenizer, say=lambda _: None)  # for what it refuses: a chat has no max_length
    device = device_here(processor=loaded.config.model.backend == "cpu")
    precision = choose_backend(loaded.config, device).precision
    model = open_trained(folder, dtype=precision.storage, device=device, say=say, base=typed_base(loaded))

    positions = positions_of(model)

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

        prompt = tokenizer.encode_prompt(turns)
        if positions is not None and len(prompt) >= positions:
            raise ConfigError(_no_room(len(prompt), positions))
        ids = generate(
            model,
            [prompt],
            end_ids=tokenizer.all_ends,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            tell=tell,
        )
        answer = tokenizer.decode(ids[0])
        write(answer[written:])
        if positions is not None and len(prompt) + len(ids[0]) >= positions:
            say(f"the answer ends here because this model has {positions:,} positions")
        return answer

    return reply
