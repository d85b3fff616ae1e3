"""Exports a trained model in the form that another tool loads, and compares the export with the trained model before it gets its name.

Each export is written into a folder beside its final one, read again, compared on probe prompts, and renamed.
A failure on the way leaves nothing under the final name.
"""

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamahome import system_message
from llamahome.checkpoint import store
from llamahome.config.load import LoadedConfig
from llamahome.data.rows.row_error import RowError
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.processors import return_freed_memory
from llamahome.durable import read_object
from llamahome.errors import ConfigError, Problem
from llamahome.exported_model import (
    TrainedModel,
    bytes_needed,
    card_facts,
    find_trained,
    probes_of,
    raise_if_unreadable,
    require_tokenizer,
    say_which_weights,
    tokenizer_facts,
    tokenizer_of,
)
from llamahome.model.adapter import wrap_plain
from llamahome.model.auxiliary_files import copy_auxiliary_files
from llamahome.model.export import ollama
from llamahome.model.export.architectures import architecture_of
from llamahome.model.export.card import commands_inside, next_commands, python_script, write_card
from llamahome.model.export.experts import expert_of
from llamahome.model.export.gguffile import QUANTS, file_name, gguf_config, write_adapter_gguf, write_gguf
from llamahome.model.export.merge import NotStreamable, TrainedWeights
from llamahome.model.export.merged import DTYPES, write_merged
from llamahome.model.export.push import push, require_login
from llamahome.model.export.quantized import why_not_run
from llamahome.model.export.rounded import Written, accept_rounding
from llamahome.model.export.verify import (
    Difference,
    compare,
    exported_logits,
    least_tolerance,
    load_dequantized,
    load_plain,
    require_room,
    trained_logits,
)
from llamahome.model.export.vocabulary import MOST_ENDS
from llamahome.model.load import quiet_transformers
from llamahome.monitoring.resources import free_memory_bytes
from llamahome.rundir import as_typed, refuse_unwritable

_EXPORTS = Path("output/exports")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """An export that stands under its final name."""

    to: str
    path: Path
    files: list[str]
    difference: Difference
    quant: str
    commands: tuple[str, ...]
    """What uses the export, to be typed where the export was."""
    script: str | None
    """Five lines of Python that answer as `llamahome chat` does; None for a GGUF file."""
    pushed: str | None = None
    """The address of the repository on a hub that holds it."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "to": self.to,
            "path": str(self.path),
            "files": self.files,
            "max_logit_difference": self.difference.greatest,
            "tolerance": self.difference.tolerance,
            "quant": self.quant,
            "same_choices": self.difference.same_choices,
            "script": self.script,
            "pushed": self.pushed,
        }


@dataclass(frozen=True)
class Wanted:
    """What a user asks an export to be."""

    to: str
    """adapter, merged, gguf or ollama."""
    quant: str | None = None
    """The type of the weights; None for the usual one of the form."""
    output: Path | None = None
    system: str | None = None
    """The system message of a Modelfile; None for the one that all training rows began with, empty for none."""
    push: str | None = None
    """The id of a repository on a hub."""
    public: bool = False


def export(target: str, wanted: Wanted, *, loaded: LoadedConfig, say: Say) -> Exported:
    """Export the model that `target` names (run, checkpoint, model folder or name). Raises ConfigError, MachineError, SaveFailed."""
    to, output = wanted.to, wanted.output
    _refuse_unused(wanted)
    quiet_transformers()
    model = find_trained(target, loaded, say)
    quant = _quant(to, wanted.quant)
    if to == "adapter" and model.adapter is None:
        message = "all of its weights were trained, so there is no adapter"
        raise ConfigError(Problem(code="export.no-adapter", message=message, where=as_typed(model.folder), hint="--to merged"))
    goal = output or _EXPORTS / model.name / f"{to}-{quant}"
    _refuse_used(goal)
    if to in ("gguf", "ollama"):
        architecture_of(gguf_config(model.base))
    refuse_unwritable(goal, what="the export")
    goal.parent.mkdir(parents=True, exist_ok=True)
    differences: list[Difference] = []

    def fill(folder: Path) -> None:
        differences.append(_write(folder, model, replace(wanted, quant=quant), loaded=loaded, say=say))

    try:
        store.require_space(goal.parent, bytes_needed(model, to, quant), what="the export")
        store.write_folder(goal, fill)
    except store.SaveFailed as error:
        raise_if_unreadable(error.__cause__, goal)
        message = error.problems[0].message.replace("; earlier ones are untouched", "")
        hint = "--output DIR on another disk"
        raise store.SaveFailed(Problem(code="export.write-failed", message=message, where=as_typed(goal), hint=hint)) from error
    finally:
        shutil.rmtree(goal.with_name(f"{goal.name}.tmp"), ignore_errors=True)
    if model.system is not None and to != "ollama":
        say(f"the training rows begin with the system message {system_message.shown(model.system)}: ask the export with it, too")
    files = sorted(path.relative_to(goal).as_posix() for path in goal.rglob("*") if path.is_file())
    pushed = push(goal, wanted.push, public=wanted.public) if wanted.push is not None else None
    commands = next_commands(as_typed(goal), to, files, name=model.name)
    return Exported(to, goal, files, differences[0], quant, commands, python_script(str(goal), to), pushed)


def _refuse_unused(wanted: Wanted) -> None:
    """Raise ConfigError for options that this form has no use for, and where a push could not succeed."""
    if wanted.system is not None and wanted.to != "ollama":
        message = f"only a Modelfile holds a system message, and {wanted.to} has none"
        raise ConfigError(Problem(code="export.unused-option", message=message, where="--system", hint="--to ollama"))
    if wanted.public and wanted.push is None:
        raise ConfigError(Problem(code="export.unused-option", message="nothing is pushed without --push", where="--public"))
    if wanted.push is not None:
        require_login(wanted.push, wanted.to)


def commands_to_serve(target: str, loaded: LoadedConfig, *, say: Say) -> tuple[str, list[str]]:
    """The name of a model, and the commands that serve it with vLLM and Ollama. Raises what finding it raises."""
    model, typed = find_trained(target, loaded, say), shlex.quote(target)
    merged, ollama_folder = (_EXPORTS / model.name / form for form in ("merged-bf16", "ollama-q8_0"))
    served = merged if model.adapter is not None else model.folder
    commands = [f"llamahome export {typed} --to merged"] if model.adapter is not None and not merged.exists() else []
    commands.append(f"vllm serve {as_typed(served)}")
    try:
        architecture_of(gguf_config(model.base))
    except ConfigError:  # a family that llama.cpp does not have
        return model.name, commands
    commands += [f"llamahome export {typed} --to ollama"] if not ollama_folder.exists() else []
    return model.name, [*commands, f"ollama create {ollama.ollama_name(model.name)} -f {shlex.quote(f'{ollama_folder}/Modelfile')}"]


def _quant(to: str, quant: str | None) -> str:
    known = {"adapter": ("f32",), "merged": tuple(DTYPES), "gguf": tuple(QUANTS), "ollama": tuple(QUANTS)}[to]
    chosen = quant or {"adapter": "f32", "merged": "bf16", "gguf": "f16", "ollama": "q8_0"}[to]
    if chosen not in known:
        message = f"{to} has no {chosen}; it has {', '.join(known)}"
        raise ConfigError(Problem(code="export.unknown-quant", message=message, where="--quant", hint=f"--quant {known[-1]}"))
    return chosen


def _refuse_used(goal: Path) -> None:
    if os.path.lexists(goal) and (not goal.is_dir() or any(goal.iterdir())):
        message = "something is there already"
        raise ConfigError(Problem(code="export.exists", message=message, where=str(goal), hint="--output DIR with a new folder"))


def _write(folder: Path, model: TrainedModel, wanted: Wanted, *, loaded: LoadedConfig, say: Say) -> Difference:
    """Write everything into `folder` and compare it with the trained model. Raises what comparing raises."""
    to, quant, free = wanted.to, str(wanted.quant), free_memory_bytes()
    say_which_weights(model, to, say)
    weights = _streamed(model, say if to != "adapter" else lambda _: None)
    if to == "adapter":
        _copy_adapter(folder, model)
    elif to == "merged":
        _write_merged(folder, model, weights, quant)
    else:
        _write_gguf(folder, model, weights, tokenizer_of(model, loaded), wanted, say=say)
    if to in ("adapter", "merged"):
        require_tokenizer(folder, model, loaded)
    prompts = probes_of(model, loaded)
    unaided = why_not_run(model.base)
    say(f"comparing it with the trained model{f' by its de-quantised weights, because {unaided}' if unaided else ''}")
    return_freed_memory(os.environ)  # what is kept of the layers of two models would add up
    trained = trained_logits(model.folder, model.base, weights, prompts, free=free)
    exported = exported_logits(folder, model.base, weights, prompts, to=to, free=free)
    difference = compare(trained, exported, quant=quant, least=least_tolerance(model.quantization, weights))
    difference = accept_rounding(difference, Written(folder, to, model.base, model.folder, weights), trained, prompts, say=say)
    difference.require(f"the export ({to}, {quant})")
    write_card(folder, card_facts(model, f"{to}, {quant}", difference), commands_inside(folder, to, name=model.name))
    return difference


def _streamed(model: TrainedModel, say: Say) -> TrainedWeights | None:
    """The weights tensor by tensor; None where only PEFT can merge them, in memory."""
    try:
        return TrainedWeights(model.base, model.adapter)
    except NotStreamable as why:
        say(f"the adapter is merged in memory, because {why}")
        return None


def _copy_adapter(folder: Path, model: TrainedModel) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(model.folder / name, folder / name)
    copy_auxiliary_files(model.base, folder)
    copy_auxiliary_files(model.folder, folder)


def _write_merged(folder: Path, model: TrainedModel, weights: TrainedWeights | None, quant: str) -> None:
    if weights is not None:
        write_merged(folder, weights, base=model.base, dtype=DTYPES[quant])
    else:
        require_room(model.base, free_memory_bytes(), what="merging the adapter")
        plain = load_dequantized(model.base) if model.quantization else load_plain(model.base)
        merged: Any = wrap_plain(plain, model.folder, merge=True).to(DTYPES[quant])
        merged.config.dtype = DTYPES[quant]
        merged.save_pretrained(folder, max_shard_size="5GB")
    copy_auxiliary_files(model.base, folder)
    copy_auxiliary_files(model.folder, folder)


def _write_gguf(
    folder: Path, model: TrainedModel, weights: TrainedWeights | None, tokenizer: ChatTokenizer, wanted: Wanted, *, say: Say
) -> None:
    to, quant = wanted.to, str(wanted.quant)
    if weights is None:
        why = "its adapter can only be merged in memory, and GGUF files are written tensor by tensor: export it merged, then that folder"
        raise ConfigError(Problem(code="export.unsupported", message=why, where="--to", hint="--to merged"))
    if len(tokenizer.all_ends) > MOST_ENDS:
        left = ", ".join(tokenizer.decode([number]) for number in tokenizer.all_ends[MOST_ENDS:])
        say(f"a GGUF file names {MOST_ENDS} tokens that end an answer, so {left} must be a stop word of the program that loads it")
    config, path = gguf_config(model.base), folder / file_name(model.name, quant)
    write_gguf(path, weights, config, tokenizer_facts(tokenizer), quant=quant, name=model.name)
    if model.adapter is not None and weights.plain and to == "gguf" and not any(expert_of(name) for name in weights.changed):
        write_adapter_gguf(folder / file_name(model.name, "adapter"), weights, config, name=f"{model.name} adapter")
    if to == "ollama":
        _write_modelfile(folder, path.name, model, tokenizer, wanted.system, say=say)


def _write_modelfile(folder: Path, gguf_name: str, model: TrainedModel, tokenizer: ChatTokenizer, typed: str | None, *, say: Say) -> None:
    frame = None
    if tokenizer.chat_template is not None:
        bos = (tokenizer.bos_token or "") if tokenizer.adds_bos else ""  # Ollama writes it itself

        def render(turns: ollama.Turns) -> str:
            try:
                return tokenizer.render([dict(turn) for turn in turns], add_generation_prompt=True).removeprefix(bos)
            except RowError as error:
                raise ValueError(error.message) from error

        frame = ollama.find_frame(render)
    else:
        say("the model has no chat template: Ollama continues plain text")
    stops = [tokenizer.decode([number]) for number in tokenizer.all_ends]
    stated = read_object(model.folder / "generation_config.json") or read_object(model.base / "generation_config.json")
    system = typed if typed is not None else _system_of_rows(model, frame, say)
    text = ollama.modelfile(gguf_name, frame, stops=stops, sampling=ollama.sampling_of(stated), system=system or None)
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def _system_of_rows(model: TrainedModel, frame: ollama.ChatFrame | None, say: Say) -> str | None:
    """The system message that all training rows began with, if a Modelfile can set it; says what becomes of it."""
    if model.system is None:
        return None
    told, why = (
        f"the training rows begin with the system message {system_message.shown(model.system)}",
        ollama.why_no_system(model.system, frame),
    )
    if why is not None:
        say(f"{told}; the Modelfile does not set it: {why}")
        return None
    say(f"{told}; the Modelfile sets it (--system TEXT sets another, --system '' none)")
    return model.system
