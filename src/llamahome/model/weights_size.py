"""How many bytes a base takes as it is loaded on a processor, whether it can be streamed instead, and a refusal if neither fits.

Weights stay in their files if these hold the type of the run, so their memory can be given back; all others are converted, and held.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from llamahome.config.schema import Config
from llamahome.distributed.world import World
from llamahome.errors import Problem
from llamahome.model.export.experts import expert_of
from llamahome.model.limits import read_header
from llamahome.model.place import Strategy, count_weights, shards_of, weight_bytes
from llamahome.model.quantized_sizes import Sizes
from llamahome.units import show_bytes

_FILE_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PACKED_TYPES = ("U8", "I8")
_ITEM_BYTES = {"F64": 8, "F32": 4}
_MOSTLY = 0.9
"""Share of the bytes that must stay in their files."""


@dataclass(frozen=True)
class BaseSize:
    """The weights of a base in the type of a run."""

    nbytes: int
    """As they are loaded."""
    mapped: int
    """Bytes that stay in their files; 0 if a tenth of all does not."""
    types: str
    """Those in the files that are not the type of the run."""
    joined: bool = False
    """Whether more than a tenth of it are single experts, which are stacked as they are loaded."""

    def why_held(self, dtype: torch.dtype) -> str:
        """Why it does not stay in its files."""
        if self.joined:
            return "its experts are stacked as they are loaded"
        return f"the files hold {self.types} and the run computes from {str(dtype).removeprefix('torch.')}"


def size_in(folder: Path, dtype: torch.dtype) -> BaseSize:
    """The base in `folder` loaded in `dtype`, from the headers of its files; nothing of those that cannot be read.

    Tensors of single experts do not stay, because transformers stacks them.
    """
    whole = mapped = loaded = joined = 0
    others = set[str]()
    for path in folder.glob("*.safetensors"):
        try:
            for name, entry in read_header(path).tensors.items():
                (start, end), kind, single = entry["data_offsets"], str(entry["dtype"]), expert_of(name) is not None
                same = kind in (_FILE_TYPES.get(dtype), *_PACKED_TYPES)
                whole += end - start
                mapped += (end - start) * (same and not single)
                joined += (end - start) * single
                loaded += end - start if same else (end - start) // _ITEM_BYTES.get(kind, 2) * dtype.itemsize
                others |= set() if same else {kind}
        except (OSError, ValueError, KeyError, TypeError):
            return BaseSize(0, 0, "")
    return BaseSize(loaded, mapped if mapped >= _MOSTLY * whole else 0, ", ".join(sorted(others)), joined > (1 - _MOSTLY) * whole)


def size_quantized(folder: Path, dtype: torch.dtype, sizes: Sizes) -> BaseSize:
    """The quantised copy of the base in `folder`, which may not be written yet; `sizes` are what quantising it comes to."""
    plain, rest = size_in(folder, dtype), (sizes.all_numbers - sizes.packed_numbers) * dtype.itemsize
    mapped = sizes.nbytes + (rest + sizes.int8_numbers * dtype.itemsize if plain.mapped else 0)
    return BaseSize(sizes.packed_bytes + rest, mapped if mapped >= _MOSTLY * sizes.file_bytes else 0, plain.types)


def refuse_larger_than_memory(
    config: Config, base: BaseSize, folder: Path, dtype: torch.dtype, *, strategy: Strategy, world: World, free: int
) -> Problem | None:
    """Why the base in `folder`, loaded in `dtype`, cannot be trained by processes that have `free` bytes each; None if it can.

    A frozen base that stays in its files is streamed by a single process, and several processes with whole weights share its memory.
    """
    training, streams = config.training, base.mapped > 0 and config.training.method == "lora"
    if training.method == "full":
        needed = weight_bytes(count_weights(folder), method="full", storage=dtype, optimizer=training.optimizer)
    else:
        needed = base.nbytes
    sharers = world.local_size if streams and strategy == "replicate" else shards_of(strategy, world)
    if (streams and world.size == 1) or needed // sharers <= free:
        return None
    what = f"its weights{' with gradients and optimizer' if training.method == 'full' else ''} take {show_bytes(needed // sharers)}"
    if training.method == "full":
        why, hint = "full fine-tuning changes all of them", "--method lora, or a smaller --model"
    elif streams:
        why, hint = f"that is for one process, and these are {world.size}", "--world-size 1"
    else:
        why, hint = base.why_held(dtype), "--set model.quantization=nf4, or a smaller --model"
        if base.joined or config.model.quantization is not None:
            hint = "a smaller --model"
        elif base.types == "F32":
            hint = "--set model.dtype=float32"
    each = " in each process" if world.size > 1 else ""
    message = f"{what}{each}, {show_bytes(max(0, free))} are free, and they cannot be read as they are used: {why}"
    return Problem(code="model.larger-than-memory", message=message, where="model.name", hint=hint)
