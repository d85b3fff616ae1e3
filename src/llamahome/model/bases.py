"""Where the base of an adapter is now, when it is not where the adapter's folder says.

A folder fits when its weights have the names and widths that the adapter was made for; only headers are read.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llamahome.errors import Problem
from llamahome.rundir import BASE_MODELS, as_typed

_MOST = 200
"""Folders that are looked at in one place."""


def base_is_gone(recorded: str, where: str, *, adapter: Path | None = None) -> Problem:
    """The base `recorded` in `where` is not there; the hint holds for every command that knows --set.

    With `adapter` the folders around both places are searched for one that fits, and it is named when it is the only one of its place.
    """
    fitting = _fitting(recorded, adapter) if adapter is not None else []
    message = f"the base model {recorded!r} that is recorded there cannot be found: no folder here, and not fetched from a hub"
    hint = f"--set model.name={as_typed(fitting[0])}" if len(fitting) == 1 else "--set model.name=FOLDER, its new place"
    return Problem(code="model.base-gone", message=message, where=where, hint=hint)


def _fitting(recorded: str, adapter: Path) -> list[Path]:
    """Folders that hold a base for the adapter, of the first place that has any: near the old one, data/models/base, beside the adapter."""
    wanted = _widths(adapter)
    places = [Path(recorded).expanduser().parent, BASE_MODELS, *list(adapter.resolve().parents)[:2]]
    for place in places:
        folders = islice(sorted(place.iterdir()), _MOST) if wanted and place.is_dir() else []
        if found := [folder for folder in folders if (folder / "config.json").is_file() and _has(folder, wanted)]:
            return found
    return []


def _widths(adapter: Path) -> dict[str, int]:
    """Inputs of each adapted layer, by the name of its weight in the base."""
    found = {}
    for name, shape in _shapes(adapter / "adapter_model.safetensors"):
        layer, mark, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if mark and ".experts" not in layer:
            found[f"{layer}.weight"] = shape[-1]
    return found


def _has(folder: Path, wanted: dict[str, int]) -> bool:
    shapes = {name: shape for path in folder.glob("*.safetensors") for name, shape in _shapes(path)}
    return all(name in shapes and width in shapes[name] for name, width in wanted.items())


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                yield name, file.get_slice(name).get_shape()
    except (OSError, SafetensorError):
        return
