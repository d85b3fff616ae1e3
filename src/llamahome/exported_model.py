"""The trained model that an export is made of: its folder, base, name, tokenizer, probe prompts, and what the model card says of it."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamahome import system_message
from llamahome.checkpoint import store
from llamahome.checkpoint.manifest import read as read_manifest
from llamahome.checkpoint.state import STATE, first_evaluation, read_state
from llamahome.config.load import LoadedConfig, read_saved_config
from llamahome.conversation import computed_base, model_folder
from llamahome.data.text.tokenizer_files import tokenizer_source
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.durable import read_object
from llamahome.errors import CheckpointError, ConfigError, Problem
from llamahome.model.adapter_folder import base_of, is_adapter
from llamahome.model.export.merged import license_of
from llamahome.model.export.quantized import method_of, quantization_of
from llamahome.model.export.verify import PROBES, Difference, float32_bytes
from llamahome.model.export.vocabulary import TokenizerFacts
from llamahome.monitoring.display import metric_name
from llamahome.rundir import RunPaths, as_typed, open_run, run_of

Say = Callable[[str], None]
_SAMPLED = 1 << 20
"""Bytes."""
_QUANTIZED_NAME = re.compile(r"(?i)(?<![a-z0-9])(bnb-)?(4|8)-?bit|(?<![a-z0-9])(nf4|fp4|int4|int8|gptq|awq)(?![a-z0-9])")
"""Matches names of bases whose weights are quantised, as they are called on the hub."""


@dataclass(frozen=True)
class TrainedModel:
    """The trained model that is exported."""

    folder: Path
    base: Path
    """Folder of its weights without the adapter; `folder` itself where all weights were trained."""
    name: str
    checkpoint: Path | None
    """The checkpoint of these weights, or the newest of the run that they end; its manifest names data and step."""
    system: str | None = None
    """The system message that all training rows began with."""

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter; None where all weights were trained."""
        return self.folder if is_adapter(self.folder) else None

    @property
    def quantization(self) -> str | None:
        """How the weights of the base are quantised, in words; None where they are plain numbers."""
        settings = quantization_of(self.base)
        return method_of(settings) if settings is not None else None


def find_trained(target: str, loaded: LoadedConfig, say: Say) -> TrainedModel:
    """The model that `target` names: a run, a checkpoint, a model folder or a name. Raises ConfigError or MachineError."""
    folder = model_folder(target, loaded, say=say)
    base = computed_base(folder, loaded, say=say)
    weights = folder if is_adapter(folder) else base
    run = run_of(folder)
    if run is None:
        return TrainedModel(weights, base, folder.resolve().name, None)
    paths, system = open_run(run), system_message.of_model(folder)
    if folder.resolve().parent == run:
        return TrainedModel(weights, base, paths.run_id, _checkpoint_of(paths, folder), system)
    checkpoint = folder.resolve().parent
    return TrainedModel(weights, base, f"{paths.run_id}-{checkpoint.name}", checkpoint, system)


def _checkpoint_of(paths: RunPaths, final: Path) -> Path | None:
    """The checkpoint with the weights of the final model, which is not the newest one if output.final was best; else the newest."""
    checkpoints = [path for _, path in reversed(paths.checkpoints())]
    own = _sample(final)
    return next((path for path in checkpoints if own and _sample(path / store.MODEL) == own), next(iter(checkpoints), None))


def _sample(folder: Path) -> list[tuple[str, int, bytes, bytes]]:
    """Name, size, and some bytes of the beginning and the end of each file of weights, in which every step of training differs."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            first, size = file.read(_SAMPLED), path.stat().st_size
            file.seek(max(0, size - _SAMPLED))
            found.append((path.name, size, first, file.read(_SAMPLED)))
    return found


def _other_base(model: TrainedModel) -> str | None:
    """What to know of an adapter that is computed beside a quantised copy of the base that its folder names; None for any other model."""
    recorded = base_of(model.folder) if model.adapter is not None else ""
    if model.quantization is None or not recorded or Path(recorded).resolve() == model.base.resolve():
        return None
    taken = f"what loads it takes {Path(recorded).name} as it is, where its answers are a little different"
    return f"compared beside the base in {model.quantization}; {taken}"


def say_which_weights(model: TrainedModel, to: str, say: Say) -> None:
    """Say with which weights of the base the export is computed, where a base in few bits is involved."""
    recorded = base_of(model.folder) if model.adapter is not None else ""
    if to == "adapter":
        if (told := _other_base(model)) is not None:
            say(f"the adapter is exported alone, {told}; --to merged holds what was learned")
        return
    if (method := model.quantization) is not None:
        merged = "the adapter is merged into" if model.adapter is not None else "the export holds"
        say(f"the weights of {as_typed(model.base)} are quantised ({method}): {merged} the numbers that they stand for")
    elif _QUANTIZED_NAME.search(Path(recorded).name):
        used = f"{as_typed(model.base)}, whose weights are not quantised"
        say(f"the adapter was trained on {recorded}, whose weights are quantised by its name; it is merged into those of {used}")


def tokenizer_of(model: TrainedModel, loaded: LoadedConfig) -> ChatTokenizer:
    """The tokenizer beside the trained weights, or that of the base where an adapter has none. Raises ConfigError."""
    own = (model.folder / "tokenizer_config.json").is_file() or (model.folder / "tokenizer.json").is_file()
    return open_tokenizer(tokenizer_source(model.folder if own else model.base, loaded.config.model))


def require_tokenizer(folder: Path, model: TrainedModel, loaded: LoadedConfig) -> None:
    """Raise ConfigError if the tokenizer that was copied into the export in `folder` cannot be opened, so that nobody could use it."""
    try:
        open_tokenizer(tokenizer_source(folder, loaded.config.model))
    except ConfigError as error:
        raise ConfigError([replace(problem, where=as_typed(model.folder)) for problem in error.problems]) from error


def raise_if_unreadable(cause: BaseException | None, goal: Path) -> None:
    """Raise ConfigError if what failed was reading a file of the model, not writing one of the export."""
    if (
        isinstance(cause, OSError)
        and cause.filename is not None
        and not _within(Path(str(cause.filename)), goal.parent / f"{goal.name}.tmp")
    ):
        message = f"it cannot be read: {cause.strerror}"
        raise ConfigError(Problem(code="model.unreadable", message=message, where=str(cause.filename))) from cause


def _within(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute()) or path.absolute() == folder.parent.absolute()


def bytes_needed(model: TrainedModel, to: str, quant: str) -> int:
    """Bytes of the disk that the export takes, about."""
    if to == "adapter":
        return sum(path.stat().st_size for path in model.folder.rglob("*") if path.is_file())
    share = {"f32": 1.0, "f16": 0.5, "bf16": 0.5, "q8_0": 0.27, "q5_1": 0.2, "q5_0": 0.2, "q4_1": 0.18, "q4_0": 0.18}[quant]
    return int(float32_bytes(model.base) * share * 1.05) + 32 * 2**20


def probes_of(model: TrainedModel, loaded: LoadedConfig) -> list[list[int]]:
    """Token ids of the probe prompts."""
    return tokenizer_of(model, loaded).encode_ids(PROBES)


def tokenizer_facts(tokenizer: ChatTokenizer) -> TokenizerFacts:
    """What a GGUF file says of a tokenizer."""
    return TokenizerFacts(
        content=json.loads(tokenizer.describe()["tokenizer.json"]),
        bos=tokenizer.bos_id,
        pad=tokenizer.pad_id,
        adds_bos=tokenizer.adds_bos,
        ends=tokenizer.all_ends,
        chat_template=tokenizer.chat_template,
    )


def card_facts(model: TrainedModel, form: str, difference: Difference) -> Mapping[str, Any]:
    """What the card says, in its order. A base in a folder of this machine is named without its path."""
    recorded = base_of(model.folder) if model.adapter is not None else ""
    settings = read_object(model.folder / "adapter_config.json")
    vera = settings is not None and settings.get("peft_type") == "VERA"
    return {
        "name": model.name,
        "form": form,
        "base model": Path(recorded).name if Path(recorded).is_dir() else recorded,
        "weights of the base": _weights_of_base(model, form),
        "licence": license_of(model.base),
        "rank, alpha": f"{settings.get('r')}, {settings.get('lora_alpha')}" if settings and not vera else None,
        "rank": f"{settings.get('r')} (VeRA)" if settings and vera else None,
        "system message of all rows": model.system,
        **(_trained_as(model.checkpoint) if model.checkpoint is not None else {}),
        "greatest logit difference": f"{difference.greatest:.3g} (at most {difference.tolerance:.3g} accepted)",
        "same next token": f"{difference.same_choices:.1%} of probe positions",
    }


def _weights_of_base(model: TrainedModel, form: str) -> str | None:
    if model.quantization is None:
        return None
    alone = _other_base(model) if form.startswith("adapter") else None
    return alone or f"de-quantised from {model.quantization}"


def _trained_as(checkpoint: Path) -> dict[str, Any]:
    """Data, settings and held-out figures of a checkpoint; what is damaged there is left out."""
    facts: dict[str, Any] = {}
    with suppress(CheckpointError):
        manifest = read_manifest(checkpoint)
        facts |= {"data fingerprint": manifest.fingerprints.data, "steps": manifest.step}
    with suppress(ConfigError):
        training = read_saved_config(checkpoint / "config.yaml").config.training
        of_step = f"{training.batch_size} rows a step, learning rate {training.learning_rate}, {training.schedule}, {training.optimizer}"
        facts["training"] = f"{training.objective}, {training.method}, {of_step}, seed {training.seed}"
    with suppress(CheckpointError):
        state = read_state(checkpoint / STATE)
        first = first_evaluation(state)
        if state.eval_loss is not None:
            before = f"{first['loss']:.4f} before training, " if "loss" in first else ""
            facts["held-out loss"] = f"{before}{state.eval_loss:.4f} after it"
        judged = state.extra.get("judged") or {}
        if judged.get("metric", "loss") != "loss" and judged.get("step") == state.step:
            facts[f"held-out {metric_name(judged['metric'])}"] = f"{judged['value']:.4f}"
    return facts
