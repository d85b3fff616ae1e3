"""What the folder of an adapter says about its base: the recorded name, and the folder where that base lies now. No weights are loaded."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from llamahome.errors import ConfigError, MachineError, Problem
from llamahome.model.limits import shapes_of
from llamahome.model.load import find_model
from llamahome.model.weightfiles import check_adapter_file
from llamahome.rundir import BASE_MODELS, as_typed

CONFIG = "adapter_config.json"
"""The file of an adapter's folder that names its base and how its layers are adapted."""
_MOST_FOLDERS = 200
"""Number of folders per directory in which a moved base is searched."""


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The name of the base model that an adapter's folder records."""
    return str(adapter_config(folder)["base_model_name_or_path"])


def adapter_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json in `folder` says. Raises ConfigError if it cannot be read or names no base."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(Problem(code="model.unreadable", message=f"{CONFIG} cannot be read", where=str(folder))) from error
    return config


def find_base(folder: Path, *, typed: str | None = None, say: Callable[[str], None]) -> Path:
    """The folder of an adapter's base: `typed` if given, else the base that the adapter records. Raises as find_model does.

    A name that means nothing here is looked for above the adapter, whose project may have moved or not be the working folder.
    """
    recorded = base_of(folder)
    check_adapter_file(folder)
    try:
        return find_model(typed or recorded, say=say)
    except (ConfigError, MachineError) as error:
        if typed is None and error.problems[0].code in ("model.not-found", "model.hub-failed"):
            if (above := _base_above(folder, recorded)) is not None:
                say(f"the base of {as_typed(folder)} is {as_typed(above)}")
                return above
            where = f"{folder / CONFIG}: base_model_name_or_path"
            raise ConfigError(base_is_gone(recorded, where, adapter=folder)) from error
        raise


def base_is_gone(recorded: str, where: str, *, adapter: Path | None = None) -> Problem:
    """The problem that the base `recorded` in `where` does not exist; its hint works with every command that has --set.

    With `adapter`, the directories around the recorded base and the adapter are searched. The hint names a folder if exactly one fits.
    """
    fitting = _fitting_bases(recorded, adapter) if adapter is not None else []
    message = f"the base model {recorded!r} that is recorded there cannot be found: it is no local folder, and no hub delivers it"
    hint = f"--set model.name={as_typed(fitting[0])}" if len(fitting) == 1 else "--set model.name=FOLDER, the folder where the base is now"
    return Problem(code="model.base-gone", message=message, where=where, hint=hint)


def _base_above(adapter: Path, recorded: str) -> Path | None:
    """The fitting folder with the name `recorded` in a project above `adapter`."""
    name = Path(recorded).expanduser()
    names = [BASE_MODELS / name.name, *([] if name.is_absolute() else [name, BASE_MODELS / name])]
    found = (parent / name for parent in adapter.resolve().parents for name in names)
    sizes = _layer_sizes(adapter)
    return next((each for each in found if (each / "config.json").is_file() and _fits(each, sizes)), None)


def _fitting_bases(recorded: str, adapter: Path) -> list[Path]:
    """The fitting folders in the first directory that has any: the recorded one, data/models/base, those above the adapter."""
    layer_sizes = _layer_sizes(adapter)
    directories = [Path(recorded).expanduser().parent, BASE_MODELS, *list(adapter.resolve().parents)[:2]]
    for directory in directories:
        folders = islice(sorted(directory.iterdir()), _MOST_FOLDERS) if layer_sizes and directory.is_dir() else []
        if fitting := [folder for folder in folders if (folder / "config.json").is_file() and _fits(folder, layer_sizes)]:
            return fitting
    return []


def _layer_sizes(adapter: Path) -> dict[str, int]:
    """A size of each adapted layer, that of its input or, with VeRA, output, by the name of its weight in the base."""
    sizes = {}
    for name, shape in shapes_of(adapter).items():
        layer, mark, _ = name.removeprefix("base_model.model.").replace(".vera_lambda_b", ".lora_A.").partition(".lora_A.")
        if mark and ".experts" not in layer:
            sizes[f"{layer}.weight"] = shape[-1]
    return sizes


def _fits(folder: Path, layer_sizes: dict[str, int]) -> bool:
    shapes = shapes_of(folder)
    return all(name in shapes and size in shapes[name] for name, size in layer_sizes.items())
