"""The quantised copy of a base: made at the first use, found again at every later one, because its name holds the base's fingerprint."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llamahome.errors import ConfigError
from llamahome.model.export.quantized import quantization_of
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.fingerprints import fingerprint
from llamahome.model.load_packed import quantized_twice
from llamahome.model.model_folder import check_folder
from llamahome.model.quantize import minutes_to_fit, write_quantized
from llamahome.model.quantized_sizes import BYTES, MOST_BYTES, MOST_FITTED, Kind, Sizes, block_of, sizes_of
from llamahome.model.rounding import SMALL_BLOCK
from llamahome.rundir import QUANTIZED_MODELS, as_typed
from llamahome.units import show_bytes

_ROUNDING = {"nf4": " rounded for the inputs of layers, some layers in 8 bits, blocks of 32, scales of both signs, 16,384 tokens"}
"""A part of the name of a copy, because other rounding gives other weights."""


def quantized_base(base: Path, kind: Kind, *, say: Callable[[str], None]) -> Path:
    """The folder of `base` in `kind`, written now if it is not there. Raises what `write_quantized` raises."""
    if quantization_of(base) is not None:
        raise ConfigError(quantized_twice(base))
    folder = _folder_of(base, kind)
    if folder.is_dir():
        _check(folder, base)
    else:
        write_quantized(base, kind, folder, say=say)
    say(f"the base is computed from {as_typed(folder)}")
    return folder


def expected_sizes(base: Path, kind: Kind, *, say: Callable[[str], None] = lambda _: None) -> Sizes:
    """What `base` in `kind` comes to: its copy, or before there is one what is known of it. Raises ConfigError as `sizes_of` does."""
    folder = _folder_of(base, kind)
    if written := folder.is_dir():
        _check(folder, base)
    sizes = sizes_of(base, kind, WeightStore(folder) if written else None)
    say(sizes.line(kind))
    if not written:
        fitted = kind == "nf4" and block_of(sizes.packed_numbers) == SMALL_BLOCK
        takes = f", about {minutes_to_fit(sizes.packed_numbers)} min on two cores" if fitted else ""
        say(f"before training it is written once, into {as_typed(folder)}: {show_bytes(sizes.file_bytes)}{takes}")
    return sizes


def usual_bytes(kind: Kind, numbers: int) -> float:
    """About how many bytes a number takes in a base of which `numbers` are quantised, if its layers have usual sizes."""
    return MOST_BYTES if kind == "nf4" and numbers <= MOST_FITTED else BYTES[kind]


def _check(folder: Path, base: Path) -> None:
    """Raise ConfigError if the copy in `folder` is damaged; only its removal helps, because it would be found again each time."""
    try:
        check_folder(folder)
    except ConfigError as error:
        made = f"this folder is a copy of {as_typed(base)}, which is made again if it is removed"
        problems = [replace(each, message=f"{each.message}; {made}", hint=f"rm -r {as_typed(folder)}") for each in error.problems]
        raise ConfigError(problems) from error


def _folder_of(base: Path, kind: Kind) -> Path:
    made = hashlib.sha256(f"{fingerprint(base)}{_ROUNDING.get(kind, '')}".encode()).hexdigest()
    return QUANTIZED_MODELS / f"{base.resolve().name}-{kind}-{made[:12]}"
