"""Tensors of safetensors files, read and written one at a time.

Nothing is memory-mapped, so a process never holds more than the tensors that it asked for: the peak is the largest tensor.
Source: the safetensors format, github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, the tensors.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamahome.errors import ConfigError, Problem
from llamahome.model.limits import read_header
from llamahome.model.weightfiles import weight_files, write_index

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
"""Bytes to which a header is padded with spaces."""
LARGEST_SHARD = 5_000_000_000
"""Bytes of one file, the limit that hubs and transformers use."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, from the beginning of the file."""
    nbytes: int


class WeightStore:
    """The tensors of all safetensors files of a folder, by name."""

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        """Read the headers of the files `names`, or of the model's weights. Raises ConfigError (model.no-weights, model.unreadable)."""
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        paths = [folder / name for name in names] or weight_files(folder)
        if not paths:
            raise ConfigError(Problem(code="model.no-weights", message="it has no .safetensors file", where=str(folder)))
        for path in paths:
            self.tensors |= _tensors_of(path)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        """A new tensor on the CPU in the stored type. Raises ConfigError when the file is too short."""
        info = self.tensors[name]
        content = bytearray(info.nbytes)
        with info.path.open("rb") as file:
            file.seek(info.begin)
            if file.readinto(content) != info.nbytes:
                raise ConfigError(_unreadable(info.path, f"the file ends inside {name}"))
        if not content:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(content, dtype=info.dtype).reshape(info.shape)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors if floating-point ones had `dtype`."""
        return sum(math.prod(info.shape) * stored_type(info.dtype, dtype).itemsize for info in self.tensors.values())


def _tensors_of(path: Path) -> dict[str, TensorInfo]:
    try:
        header = read_header(path)
        found = {}
        for name, entry in header.tensors.items():
            begin, end = entry["data_offsets"]
            found[name] = TensorInfo(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), header.nbytes + begin, end - begin)
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(_unreadable(path, f"its header cannot be read ({type(error).__name__})")) from error


def _unreadable(path: Path, why: str) -> Problem:
    return Problem(code="model.unreadable", message=why, where=str(path))


def stored_type(own: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """The type in which a tensor of type `own` is written: `wanted` if it holds floating-point numbers, its own otherwise."""
    return wanted if own.is_floating_point else own


def write_shards(
    folder: Path,
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    *,
    largest: int = LARGEST_SHARD,
) -> list[Path]:
    """Write `make(name)` for each (name, dtype, shape) into safetensors files of at most `largest` bytes, one tensor at a time.

    With more than one file an index is written, as transformers expects it. Returns the files of weights.
    """
    shards = list(_in_shards(tensors, largest))
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, make)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _, _ in shard}
        write_index(folder, weight_map, nbytes=sum(_size(dtype, shape) for _, dtype, shape in tensors))
    return [folder / name for name in names]


def _in_shards(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], largest: int
) -> Iterable[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    shard: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    filled = 0
    for name, dtype, shape in tensors:
        size = _size(dtype, shape)
        if shard and filled + size > largest:
            yield shard
            shard, filled = [], 0
        shard.append((name, dtype, shape))
        filled += size
    yield shard


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_file(path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], make: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + _size(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in tensors:
            tensor = make(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)} and was announced with {shape}")
            file.write(as_bytes(tensor.to(dtype)))


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of `tensor`, in the order of its elements."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
