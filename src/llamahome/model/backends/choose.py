"""Which back end a run takes, and in which number types it computes: from what was asked for, the device, and a short measurement."""

import os
import time

import torch

from llamahome.config.schema import Config
from llamahome.errors import MachineError, Problem
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.backends.cpu.native import cache_folder, processor
from llamahome.model.backends.cuda.backend import CudaBackend
from llamahome.model.backends.measured import measured
from llamahome.model.backends.reference import Reference
from llamahome.model.precision import LowPrecision, Precision, choose_precision

_ROWS, _INNER, _FEWEST_RACES, _RACES, _MOST_RACES = 512, 576, 3, 10, 30
_BORDER = (0.6, 1.6)
"""Speed-ups between these decide nothing after ten races."""
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that hold torch and its libraries to a lower instruction set."""
_HIDDEN = "torch finds no GPU; CUDA_VISIBLE_DEVICES can hide it"
_HOPELESS = 6.0
"""How many times slower bfloat16 must be after a few races to be given up: where it is emulated, one takes a tenth of a second or more."""


def choose_backend(config: Config, device: torch.device) -> Backend:
    """The back end for `device`, obeying model.backend. Raises MachineError when the machine lacks what was asked for."""
    return backend_of(_kind(config, device), device, choose_precision(config, low_precision(device)))


def backend_of(kind: str, device: torch.device, precision: Precision) -> Backend:
    """The back end of that name."""
    if kind == "cpu":
        return CpuBackend(precision)
    return (CudaBackend if kind == "cuda" else Reference)(device, precision)


def planned_backend(precision: Precision) -> Backend:
    """The back end of the accelerators that a plan is made for, which are not here; it is only asked for its figures."""
    return CudaBackend(torch.device("cpu"), precision)


def _kind(config: Config, device: torch.device) -> str:
    wanted = config.model.backend
    if wanted == "auto":
        return device.type if device.type in ("cpu", "cuda") else "reference"
    if wanted == "cuda" and device.type != "cuda":
        raise MachineError(_lacking(f"cuda is asked for, and this run is on {device.type}: {_why_no_gpu()}"))
    return wanted


def overlooked(config: Config, device: torch.device) -> str | None:
    """A line about a GPU that this machine has and that is not used, because torch cannot; None when there is none or it was not wanted."""
    if config.model.backend != "auto" or device.type != "cpu" or torch.version.cuda is None:
        return None
    why = _why_no_gpu()
    if any(sign in why for sign in _NO_GPU):
        return None
    return f"the GPU is not used, the processor is: {why}"


_NO_GPU = ("no NVIDIA driver", "No CUDA GPUs", _HIDDEN)
"""What torch says where there is no GPU or none is to be seen, which nobody has to be told."""


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # a driver that is older than this torch needs, for one
        return str(error).strip().splitlines()[0][:200]
    return _HIDDEN


def _lacking(message: str) -> Problem:
    return Problem(code="model.backend-missing", message=message, where="model.backend", hint="--set model.backend=auto")


def low_precision(device: torch.device) -> LowPrecision:
    """What this device does with bfloat16 products."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return LowPrecision(has, has, "the GPU multiplies bfloat16" if has else "this GPU has no bfloat16 products")
    return LowPrecision.measured(_kept_speedup() if device.type == "cpu" else bf16_speedup(device))


def _kept_speedup() -> float:
    """Of this processor: as an earlier start found it, else raced now and kept if the answer is clear."""
    limits = [f"{name}={os.environ.get(name, '')}" for name in _LIMITS]
    key = " ".join([f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", processor(), *limits])
    path = cache_folder() / "number-types.json"
    found = measured(path, [key], lambda _: (bf16_speedup(torch.device("cpu")),), count=1, keeps=lambda numbers: _is_clear(numbers[0]))
    return found[key][0]


def _is_clear(speedup: float) -> bool:
    return not _BORDER[0] < speedup < _BORDER[1]


def bf16_speedup(device: torch.device) -> float:
    """How many times faster this device multiplies bfloat16 than float32 matrices: best against best of short races in turn.

    Other work on the machine can spoil a race, so there are more of them while the answer is near the border. Where bfloat16 is emulated
    a few races end it, of which the first prepares the product. Takes 20 to 600 ms.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for number in range(_MOST_RACES):
        for dtype in best:
            a, b = torch.ones(_ROWS, _INNER, dtype=dtype, device=device), torch.ones(_INNER, _INNER, dtype=dtype, device=device)
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # the read waits for an asynchronous device
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        speedup = best[torch.float32] / best[torch.bfloat16]
        if (number >= _FEWEST_RACES and speedup < 1 / _HOPELESS) or (number >= _RACES and _is_clear(speedup)):
            break
    return speedup
