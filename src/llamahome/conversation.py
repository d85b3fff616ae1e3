"""Talks to a model: from the name that people type to a model that answers conversations and streams its answers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from llamahome.checkpoint import store
from llamahome.checkpoint.target import names_run, resolve
from llamahome.config.load import LoadedConfig, read_saved_config
from llamahome.data.prepare import StoredExamples, read_all, report_of
from llamahome.data.text.answer_text import AnswerText
from llamahome.data.text.tokenizer_files import tokenizer_source
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.data_limits import fit_to_model, hints_that_name, hints_within_positions, hold_vocabulary, warn_of_length
from llamahome.distributed.devices import device_here
from llamahome.errors import ConfigError, MachineError, OutOfMemory, Problem
from llamahome.model.adapter import can_switch_off, open_trained, trained_rows, without_adapter
from llamahome.model.adapter_folder import base_is_gone, find_base, is_adapter
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import choose_backend
from llamahome.model.generate import PromptCache, cached_bytes, generate, limits_of_loaded
from llamahome.model.load import CausalLM, find_model
from llamahome.model.packed_weight import widen_all, widened_bytes
from llamahome.model.packing import packing_of
from llamahome.model.quantized_copy import quantized_base
from llamahome.model.quantized_sizes import Kind
from llamahome.model.sampling import Sampling
from llamahome.model.stored_weights import unused_note
from llamahome.model.stream import stream_of
from llamahome.model.weights_size import size_in
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.rundir import BASE_MODELS, STARTER, nearby, run_of
from llamahome.units import show_bytes

_WIDENED_SHARE = 0.5
"""Share of the free memory that the widened weights of a quantised base may take."""
HELD_SHARE, _KEPT_SHARE, _ANSWERS_SHARE = 0.9, 0.5, 0.15
"""Shares of the free memory: up to which weights are held that only answer; for those that stay in memory if they are streamed; and for
the keys and values of prompts and answers then."""
_FEWEST_TOKENS = 256


def model_folder(target: str, loaded: LoadedConfig, *, say: Callable[[str], None]) -> Path:
    """The folder of the model that `target` names: a run (its final model), a checkpoint, a model folder, or the name of a base."""
    for folder in (Path(target), Path(target) / "final", Path(target) / "model"):
        if is_adapter(folder):
            find_base(folder, typed=typed_base(loaded), say=say)
            return folder
        if (folder / "config.json").is_file():
            return _find_named(str(folder), None, say)
    is_base = target == STARTER or (BASE_MODELS / target).is_dir()
    if not is_base and names_run(target):
        paths, checkpoint = resolve(target)
        if _holds_model(paths.final):
            return paths.final
        chosen = checkpoint or store.choose(paths, warn=lambda _: None)
        lack = "has a final/ without a model" if paths.final.exists() else "has no final model yet"
        say(f"{paths.run_id} {lack}; its {chosen.name} is used")
        return chosen / store.MODEL
    return _find_named(target, loaded.config.model.revision, say)


def _holds_model(folder: Path) -> bool:
    return is_adapter(folder) or (folder / "config.json").is_file()


def _find_named(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """The folder of a model that an argument names. Raises what find_model raises, worded for an argument."""
    try:
        return find_model(name, revision=revision, say=say)
    except (ConfigError, MachineError) as error:
        raise type(error)([_as_argument(problem) for problem in error.problems]) from error


def typed_base(loaded: LoadedConfig) -> str | None:
    """model.name if it was typed with this command: the base of an adapter, instead of the one that the adapter's folder names."""
    return loaded.config.model.name if loaded.origins["model.name"] in ("--set", "--model") else None


def base_of_run(loaded: LoadedConfig, *, say: Callable[[str], None]) -> Path:
    """The folder of the base that a run trains. Raises what find_model raises, or for a resumed run that its base is missing."""
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
    """The settings fitted to the model in `folder`, which may be an adapter, and the folder of its base weights, whose limits count."""
    weights = find_base(folder, typed=typed_base(loaded), say=say) if is_adapter(folder) else folder
    return fit_to_model(loaded, weights, tokenizer, rows=trained_rows(folder), say=say), weights


def read_fitted(
    loaded: LoadedConfig, data_path: str | Sequence[str], folder: Path, *, say: Callable[[str], None], warn: Callable[[str, str], None]
) -> tuple[LoadedConfig, StoredExamples]:
    """The settings fitted to the model in `folder`, and every row of `data_path` with these."""
    tokenizer = open_tokenizer(tokenizer_source(folder, loaded.config.model))
    fitted, weights = fit_to_trained(loaded, folder, tokenizer, say=say)
    with hints_within_positions(weights), hints_that_name(str(nearby(folder))):
        rows = read_all(fitted.config.data, data_path, tokenizer, say=say)
    warn_of_length(fitted, weights, report_of(rows).longest_tokens, warn=warn)
    return fitted, rows


def _as_argument(problem: Problem) -> Problem:
    """A problem of the setting model.name, reworded for a model that is an argument of the command."""
    hint = problem.hint
    if hint is not None and hint.startswith("--model "):
        hint = f"{hint.removeprefix('--model ')}, or what `llamahome models list` and `llamahome runs list` show"
    if problem.code == "model.hub-failed":
        return replace(problem, where="MODEL", hint=hint)
    if problem.code != "model.not-found":
        return replace(problem, hint=hint)
    return replace(problem, message=problem.message.replace("no model", "no run and no model"), where="MODEL", hint=hint)


def _too_long(tokens: int, positions: int) -> Problem:
    message = f"the conversation has {tokens:,} tokens, and this model {positions:,} positions: none is left for an answer"
    return Problem(code="model.too-long", message=message, where="MODEL", hint="a shorter question, in a new conversation")


def quantization_of_run(folder: Path, loaded: LoadedConfig) -> Kind | None:
    """How the weights of the model in `folder` are quantised: as model.quantization was typed, or as the run trained that holds it.

    What a run has trained whole is in few bits only if that was typed.
    """
    if loaded.origins["model.quantization"] == "--set":
        return loaded.config.model.quantization
    if not is_adapter(folder):
        return None
    run = run_of(folder)
    return read_saved_config(run / "config.yaml").config.model.quantization if run and (run / "config.yaml").is_file() else None


def computed_base(folder: Path, loaded: LoadedConfig, *, say: Callable[[str], None]) -> Path:
    """The folder of the weights with which the model in `folder` computes: its own or its base's, or their quantised copy."""
    base = find_base(folder, typed=typed_base(loaded), say=say) if is_adapter(folder) else folder
    kind = quantization_of_run(folder, loaded)
    if kind is None:
        return base
    if loaded.origins["model.quantization"] != "--set":
        say(f"the adapter was trained beside the base in {kind}, so it is computed beside it; --set model.quantization=null takes the base")
    return quantized_base(base, kind, say=say)


def _open(folder: Path, loaded: LoadedConfig, backend: Backend, device: torch.device, *, say: Callable[[str], None]) -> CausalLM:
    """The model in `folder`; a quantised base is widened once if it fits, which gives the same numbers and answers faster."""
    base, adapts = computed_base(folder, loaded, say=say), is_adapter(folder)
    own, dtype = backend.free_bytes(1), backend.precision.storage
    free = free_memory_bytes() if own is None else own
    keep = _keep_bytes(base, dtype, free=free) if own is None else None
    opened, beside = (folder, str(base)) if adapts else (base, None)
    model = open_trained(opened, dtype=dtype, device=device, say=say, base=beside, keep_bytes=keep)
    if (stream := stream_of(model)) is not None:
        read = show_bytes(stream.base_bytes - stream.kept_bytes)
        stream.batch_tokens = max(_FEWEST_TOKENS, int(_ANSWERS_SHARE * free / cached_bytes(model)))
        say(f"the base takes {show_bytes(stream.base_bytes)}, and {show_bytes(free)} are free: each token of an answer reads {read} of it")
    elif needed := widened_bytes(model):
        if needed <= _WIDENED_SHARE * (free_memory_bytes() if own is None else own):
            widen_all(model)
        else:
            say(f"its weights stay packed, because {show_bytes(needed)} are not free to widen them once; answers take longer")
    return model


def _keep_bytes(base: Path, dtype: torch.dtype, *, free: int) -> int | None:
    """Bytes of the weights in `base` that stay in memory if they are streamed; None if they are held. OutOfMemory if neither fits."""
    size = size_in(base, dtype)
    if not size.mapped and size.nbytes > free:
        message = f"its weights take {show_bytes(size.nbytes)}, {show_bytes(free)} are free, and they cannot be read as they are used: "
        message += size.why_held(dtype)
        hint = "--set model.dtype=float32" if size.types == "F32" else "a machine with more free memory"
        raise OutOfMemory(Problem(code="model.larger-than-memory", message=message, where="MODEL", hint=hint))
    return int(_KEPT_SHARE * free) if size.mapped > HELD_SHARE * free else None


def open_to_measure(folder: Path, loaded: LoadedConfig, backend: Backend, device: torch.device, *, say: Callable[[str], None]) -> CausalLM:
    """The model in `folder` on `device`; a line says how it computes documents if that is not the usual way."""
    model = _open(folder, loaded, backend, device, say=say)
    for line in (unused_note(model), *packing_of(model).remarks()):
        if line is not None:
            say(line)
    return model


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    text: str
    finish: Literal["stop", "length", "cancelled"]
    """An end token or a stop string; the longest answer or the last position; or a request from outside."""
    prompt_tokens: int
    completion_tokens: int
    """Without the token that ends the answer."""
    reused_tokens: int
    """Tokens of the prompt that were known from the turn before."""


class ChatModel:
    """A model and its tokenizer, ready to answer. It keeps the values of the last conversation, so that its next turn starts at once."""

    def __init__(
        self, tokenizer: ChatTokenizer, model: CausalLM, folder: Path, *, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.tokenizer, self.model, self.folder = tokenizer, model, folder
        self.limits = limits_of_loaded(model)
        self._around, self._cache = around, PromptCache()

    def encode(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of the conversation up to the beginning of the next answer. Raises DataError, and ConfigError if it is too long."""
        return self._fitting(self.tokenizer.encode_prompt(turns))

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a text that the model goes on with. Raises ConfigError if it is too long."""
        begin = [self.tokenizer.bos_id] if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else []
        return self._fitting([*begin, *self.tokenizer.encode_ids([text])[0]])

    def _fitting(self, prompt: list[int]) -> list[int]:
        positions = self.limits.positions
        if positions is not None and len(prompt) >= positions:
            raise ConfigError(_too_long(len(prompt), positions))
        return prompt

    def answer(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        write: Callable[[str], None] = lambda _: None,
        stops: Sequence[str] = (),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """The answer to a prompt in tokens. `write` gets its text as it is generated; `cancelled` is asked after each token."""
        text, ends, over = AnswerText(self.tokenizer.decode, stops), self.tokenizer.all_ends, False

        def hear(ids: list[int]) -> None:
            nonlocal over
            over = ids[0] in ends
            if not over:
                write(text.add(ids))

        def stop() -> bool:
            return text.stopped or cancelled()

        with self._around():
            (ids,) = generate(self.model, [prompt], end_ids=ends, sampling=sampling, tell=hear, stop=stop, cache=self._cache)
        write(text.end())
        finish: Literal["stop", "length", "cancelled"] = "stop" if over or text.stopped else "cancelled" if cancelled() else "length"
        return Answer(text.text, finish, len(prompt), len(ids), self._cache.reused)


def open_chat(target: str, loaded: LoadedConfig, *, say: Callable[[str], None]) -> ChatModel:
    """The model that `target` names (a run, a checkpoint, a model folder or a name), ready to answer."""
    folder = model_folder(target, loaded, say=say)
    tokenizer = open_tokenizer(tokenizer_source(folder, loaded.config.model))
    weights = find_base(folder, typed=typed_base(loaded), say=say) if is_adapter(folder) else folder
    hold_vocabulary(loaded, weights, tokenizer, rows=trained_rows(folder), say=say)
    device = device_here(processor=loaded.config.model.backend == "cpu")
    model = _open(folder, loaded, choose_backend(loaded.config, device), device, say=say)
    return ChatModel(tokenizer, model, folder)


def open_beside(chat: ChatModel, target: str, loaded: LoadedConfig, *, say: Callable[[str], None]) -> ChatModel:
    """The model that `target` names, to compare `chat` with.

    The base of an adapter is the model that is loaded already, with its adapter switched off. It has its own tokenizer and template.
    """
    try:
        folder = model_folder(target, loaded, say=say)
    except ConfigError as error:
        moved = [replace(problem, where="--compare" if problem.where == "MODEL" else problem.where) for problem in error.problems]
        raise ConfigError(moved) from error
    if not is_adapter(chat.folder):
        return open_chat(target, loaded, say=say)
    base = find_base(chat.folder, typed=typed_base(loaded), say=say)
    if folder.resolve() != base.resolve() or not can_switch_off(chat.folder):
        return open_chat(target, loaded, say=say)
    tokenizer = open_tokenizer(tokenizer_source(folder, loaded.config.model))
    return ChatModel(tokenizer, chat.model, folder, around=lambda: without_adapter(chat.model))
