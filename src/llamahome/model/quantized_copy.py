"""The quantised copy of a base: made at the first use, found again at every later one, because its name holds the base's fingerprint."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from llamahome.errors import ConfigError
from llamahome.model.export.quantized import quantization_of
from llamahome.model.fingerprints import fingerprint
from llamahome.model.load_packed import quantized_twice
from llamahome.model.model_folder import check_folder
from llamahome.model.quantize import Kind, write_quantized
from llamahome.rundir import QUANTIZED_MODELS, as_typed

_ROUNDING = {"nf4": " rounded for the inputs of layers"}
"""A part of the name of a copy, because other rounding gives other weights."""


def quantized_base(base: Path, kind: Kind, *, say: Callable[[str], None]) -> Path:
    """The folder of `base` in `kind`, written now if it is not there. Raises what `write_quantized` raises."""
    if quantization_of(base) is not None:
        raise ConfigError(quantized_twice(base))
    made = hashlib.sha256(f"{fingerprint(base)}{_ROUNDING.get(kind, '')}".encode()).hexdigest()
    folder = QUANTIZED_MODELS / f"{base.resolve().name}-{kind}-{made[:12]}"
    if folder.is_dir():
        check_folder(folder)
    else:
        write_quantized(base, kind, folder, say=say)
    say(f"the base is computed from {as_typed(folder)}")
    return folder
