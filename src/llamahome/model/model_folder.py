"""Whether a folder can be a base model; if not, what it is instead and what to do: an adapter, a file of another program, no model."""

import shlex
from pathlib import Path

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.quantized import quantization_of
from llamahome.model.stored_weights import refuse_unexplained
from llamahome.model.weightfiles import INDEX, check_weight_files
from llamahome.rundir import STARTER, as_typed

_OTHER_TOOLS = {
    "params.json": "it is in the form of the model maker's own tools (params.json)",
    "model_index.json": "it is a pipeline of diffusers (model_index.json), which makes pictures",
    "modules.json": "it is a model of sentence-transformers (modules.json), which does not continue a text",
}
"""Files that say what a folder without a config.json is."""
_OTHER_WEIGHTS = {
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".mlmodelc": "Core ML",
}
"""Endings of weights in forms that are made to run a model, not to train it."""


def check_folder(folder: Path) -> None:
    """Raise ConfigError if `folder` cannot be a base model; the message says what it is instead."""
    hint = f"--model {_nested_model(folder) or STARTER}"
    other = next((path for path in sorted(folder.iterdir()) if path.suffix in _OTHER_WEIGHTS), None)
    if (folder / "adapter_config.json").is_file():
        code, message = "model.is-an-adapter", "it holds an adapter, not a base model"
        hint = f"{_from_adapter(folder)}; llamahome chat {as_typed(folder)} talks to it"
    elif (folder / "final" / "adapter_config.json").is_file():
        code, message, hint = (
            "model.is-an-adapter",
            "it is a run that trained an adapter, not a base model",
            _from_adapter(folder / "final"),
        )
    elif not (folder / "config.json").is_file():
        code, message = "model.no-config", "it has no config.json, so it is not a model folder"
        what = next((text for name, text in _OTHER_TOOLS.items() if (folder / name).is_file()), _only(other))
        message = f"{message}: {what}" if what else message
    elif any(folder.glob("*.safetensors")) or (folder / INDEX).is_file():
        check_weight_files(folder)
        _check_names(folder)
        if quantization_of(folder) is None:
            refuse_unexplained(folder)
        return
    elif pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
        message = f"its weights are pickled ({pickled[0].name}) and are not opened, because opening them could run code"
        code = "model.pickled-weights"
        hint = f"--model {STARTER}, or a copy of this model with .safetensors files"
    else:
        code, message = "model.no-weights", "it has a config.json but no .safetensors file"
        message = f"{message}: {_only(other)}" if other is not None else message
    raise ConfigError(Problem(code=code, message=message, where=str(folder), hint=hint))


def no_folder(path: Path) -> Problem:
    """The problem of a file that is given as a model."""
    message = (
        f"this is a file, and a model is the folder with its config.json and .safetensors files{f'; {_only(path)}' if _only(path) else ''}"
    )
    whole = path.suffix == ".safetensors" and (path.parent / "config.json").is_file()
    hint = f"--model {as_typed(path.parent)}" if whole else f"--model {STARTER}"
    return Problem(code="model.not-found", message=message, where=str(path), hint=hint)


def _from_adapter(folder: Path) -> str:
    """The option that goes on training an adapter; a run on a base takes it instead of --model."""
    return f"--from-adapter {as_typed(folder)} instead of --model goes on training it"


def _only(weights: Path | None) -> str:
    """What weights in a form that cannot be trained are; "" for others."""
    kind = None if weights is None else _OTHER_WEIGHTS.get(weights.suffix)
    return (
        "" if weights is None or kind is None else f"{weights.name} holds the weights as {kind}, which runs a model and cannot be trained"
    )


def _check_names(folder: Path) -> None:
    """Raise ConfigError if no .safetensors file has a name under which the weights of a model are found."""
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if (folder / INDEX).is_file() or "model.safetensors" in names:
        return
    if len(names) == 1:
        message = f"its weights are in {names[0]}, and are only found in model.safetensors"
        hint = f"mv {shlex.quote(str(folder / names[0]))} {shlex.quote(str(folder / 'model.safetensors'))}"
    else:
        message = f"its weights are in {len(names)} files, and {INDEX}, which says what is in which, is not there"
        hint = f"copy {INDEX} from where the model is from"
    raise ConfigError(Problem(code="model.incomplete", message=message, where=str(folder), hint=hint))


def _nested_model(folder: Path) -> str | None:
    """The first subfolder that holds a model, as a user types it: downloads often put the model one level deeper."""
    parents = (path.parent for pattern in ("*/config.json", "*/*/config.json") for path in sorted(folder.glob(pattern)))
    return next((as_typed(path) for path in parents if any(path.glob("*.safetensors"))), None)
