"""What is saved and loaded again: a PEFT folder for an adapter, a Hugging Face folder for a fully trained model. Safetensors only.

The folder also holds the tokenizer and generation config of the base, so that any tool loads it as it is.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.distributed.tensorfiles import Part, Pieces, write_files
from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.model.bases import base_is_gone
from llamahome.model.load import find_model, load_model
from llamahome.model.lora import quiet_peft, use_own_forward
from llamahome.model.shard import Placement
from llamahome.model.weightfiles import refuse_broken, refuse_not_finite

SavedModel: TypeAlias = PeftModel | PreTrainedModel
"""What is written to disk: an adapter's wrapper, or the model itself."""
_COMPANIONS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
]
_SAMPLE = 1 << 20


def changing(model: SavedModel) -> dict[str, Tensor]:
    """What training changes of what is saved, by its name in the state dict: trained weights, and buffers of a fully trained model."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(model, PeftModel):
        return named
    kept = model.state_dict().keys()
    return named | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def save_model(model: SavedModel, folder: Path, *, base: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write `model` into `folder` (made if need be): the adapter alone, or every weight in float32.

    `weights` are copies of what `changing` names, written in the place of what the model holds by now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # PEFT would look into the base's config on the hub to see whether the vocabulary grew; ours never does.
        values = dict(weights if weights is not None else changing(model))
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=values)
        (folder / "README.md").unlink(missing_ok=True)  # an empty model card template
    else:
        model.save_pretrained(folder, save_original_format=False, state_dict=dict(weights) if weights is not None else None)
    copy_companions(base, folder)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy tokenizer and generation config; last, for transformers would put its own reading of the latter in the place of the base's."""
    for name in _COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def save_in_parts(model: PreTrainedModel, folder: Path, *, base: Path, weights: Mapping[str, Tensor | Pieces], part: Part) -> list[Path]:
    """Write a fully trained model as `save_model` does, by several processes into several files; all of them call it.

    Returns the files of weights that this process wrote; those without weights are written by the first.
    """
    kept = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict().keys() - weights.keys()}
    written = write_files(folder, "model", {**weights, **kept}, part=part, metadata={"format": "pt"})
    if part.number == 0:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], torch.float32
        config.save_pretrained(folder)
        if len(set(written.file_of.values())) > 1:
            size = sum(tensor.nbytes for tensor in (*weights.values(), *kept.values()))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(written.file_of.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        copy_companions(base, folder)
    return written.mine


def restore_model(model: SavedModel, folder: Path, placement: Placement | None = None) -> None:
    """Put the trained weights of `folder` into a model of the same shape, in place; from whatever placement into whatever placement."""
    if isinstance(model, PeftModel):
        try:
            adapter = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            message = f"the adapter cannot be read: {str(error).splitlines()[0][:200]}"
            raise ConfigError(Problem(code="model.unreadable", message=message, where=str(folder))) from error
        _refuse_unfitting(folder, adapter, get_peft_model_state_dict(model, save_embedding_layers=False))
        set_peft_model_state_dict(model, adapter)
        return
    saved = dict(load_model(folder, dtype=torch.float32, device=torch.device("cpu")).named_parameters())
    _refuse_unfitting(folder, saved, dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in (placement.parameters if placement is not None else dict(model.named_parameters())).items():
            parameter.copy_(placement.part(name, saved[name]) if placement is not None else saved[name])


def _refuse_unfitting(folder: Path, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ConfigError unless the saved weights have the names and shapes of the wanted ones, all of them."""
    have, want = ({name: tuple(weight.shape) for name, weight in weights.items()} for weights in (saved, wanted))
    if different := sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name)):
        name = different[0]
        message = f"{len(different)} weights differ in shape from this model's: {name} is {have.get(name)} there, {want.get(name)} here"
        hint = "resume with the settings of the run itself"
        raise ConfigError(Problem(code="model.weights-do-not-fit", message=message, where=str(folder), hint=hint))


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> str:
    """The name of the base model that an adapter's folder records."""
    refuse_broken(folder, ["adapter_config.json"])
    try:
        recorded = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(Problem(code="model.unreadable", message="adapter_config.json cannot be read", where=str(folder))) from error
    return str(recorded)


def find_base(folder: Path, *, typed: str | None = None, say: Callable[[str], None]) -> Path:
    """The folder of the base of an adapter: what was `typed`, or what its folder records. Raises what find_model raises."""
    recorded = base_of(folder)
    try:
        return find_model(typed or recorded, say=say)
    except (ConfigError, MachineError) as error:
        if typed is None and error.problems[0].code in ("model.not-found", "model.hub-failed"):
            gone = base_is_gone(recorded, f"{folder / 'adapter_config.json'}: base_model_name_or_path", adapter=folder)
            raise ConfigError(gone) from error
        raise


def open_trained(
    folder: Path, *, dtype: torch.dtype, device: torch.device, say: Callable[[str], None], base: str | None = None
) -> PreTrainedModel:
    """A model to talk to or to evaluate: a base, a fully trained model, or an adapter with its base (adapter kept apart, float32).

    `base` stands in the place of the base that an adapter's folder records.
    """
    found = find_base(folder, typed=base, say=say) if is_adapter(folder) else find_model(str(folder), say=say)
    try:
        model = load_model(found, dtype=dtype, device=device)
    except ConfigError as error:  # another model is no remedy for who asks for this one
        raise ConfigError([replace(problem, hint=None) for problem in error.problems]) from error
    if not is_adapter(folder):
        return model
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise ConfigError(Problem(code="model.unreadable", message=f"PEFT cannot load it: {first}", where=str(folder))) from error
    refuse_not_finite(adapted, folder)
    use_own_forward(adapted)
    return adapted.get_base_model()


def fingerprint(folder: Path) -> str:
    """SHA-256 over a base model's config and its weights' names, sizes and a MiB from both ends and the middle of each file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
