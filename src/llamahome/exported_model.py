"""The trained model that an export is made of: its folder, base, name, tokenizer, probe prompts, and what the model card says of it."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamahome import system_message
from llamahome.checkpoint.manifest import read as read_manifest
from llamahome.config.load import LoadedConfig
from llamahome.conversation import computed_base, model_folder
from llamahome.data.text.tokenizer_files import tokenizer_source
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.durable import read_object
from llamahome.errors import ConfigError
from llamahome.model.adapter import base_of, is_adapter
from llamahome.model.export.merged import license_of
from llamahome.model.export.quantized import method_of, quantization_of
from llamahome.model.export.verify import PROBES, Difference
from llamahome.model.export.vocabulary import TokenizerFacts
from llamahome.rundir import as_typed, open_run, run_of

Say = Callable[[str], None]
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
    base = computed_base(folder, loaded, say=say) if is_adapter(folder) else folder
    run = run_of(folder)
    if run is None:
        return TrainedModel(folder, base, folder.resolve().name, None)
    paths, system = open_run(run), system_message.of_model(folder)
    if folder.resolve().parent == run:
        return TrainedModel(folder, base, paths.run_id, next((path for _, path in reversed(paths.checkpoints())), None), system)
    checkpoint = folder.resolve().parent
    return TrainedModel(folder, base, f"{paths.run_id}-{checkpoint.name}", checkpoint, system)


def say_which_weights(model: TrainedModel, say: Say) -> None:
    """Say with which weights of the base the export is computed, where a base in few bits is involved."""
    recorded = base_of(model.folder) if model.adapter is not None else ""
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


def probes_of(model: TrainedModel, loaded: LoadedConfig) -> list[list[int]]:
    """Token ids of the probe prompts; small ids for a model whose tokenizer cannot be opened, which a merged export does not need."""
    try:
        return tokenizer_of(model, loaded).encode_ids(PROBES)
    except ConfigError:
        return [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]]


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
    manifest = read_manifest(model.checkpoint) if model.checkpoint is not None else None
    settings = read_object(model.folder / "adapter_config.json")
    return {
        "name": model.name,
        "form": form,
        "base model": Path(recorded).name if Path(recorded).is_dir() else recorded,
        "weights of the base": f"de-quantised from {model.quantization}" if model.quantization else None,
        "licence": license_of(model.base),
        "rank, alpha": f"{settings.get('r')}, {settings.get('lora_alpha')}" if settings else None,
        "system message of all rows": model.system,
        "data fingerprint": manifest and manifest.fingerprints.data,
        "steps": manifest and manifest.step,
        "greatest logit difference": f"{difference.greatest:.3g} (at most {difference.tolerance:.3g} accepted)",
        "same next token": f"{difference.same_choices:.1%} of probe positions",
    }
