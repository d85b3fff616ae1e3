"""Selects the back end of a run and its number types, from the config, the device and a short measurement."""

import os
import time
from dataclasses import replace

import torch

from llamahome.config.schema import Config
from llamahome.errors import MachineError, Problem
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.backends.cpu.native import cache_folder, processor_id
from llamahome.model.backends.cuda.backend import CudaBackend
from llamahome.model.backends.measurement_cache import cached_measurements
from llamahome.model.backends.reference import Reference
from llamahome.model.precision import LowPrecision, Precision, choose_precision

_ROWS, _WIDTH = 512, 576
_MIN_TRIALS, _TRIALS, _MAX_TRIALS = 3, 10, 30
_INCONCLUSIVE = (0.6, 1.6)
"""Speed-ups in this range are inconclusive after `_TRIALS`, and more trials follow."""
_EMULATED = 6.0
"""If bfloat16 is slower by this factor after `_MIN_TRIALS`, it is emulated, and a trial takes a tenth of a second or more."""
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that restrict torch and its libraries to older instruction sets."""
_HIDDEN = "torch finds no GPU; CUDA_VISIBLE_DEVICES can hide it"
_NO_GPU = ("no NVIDIA driver", "No CUDA GPUs", _HIDDEN)
"""Messages of torch on machines without a GPU or with a hidden one, of which users need no note."""


def choose_backend(config: Config, device: torch.device) -> Backend:
    """The back end for `device` and model.backend. Raises MachineError if the machine lacks the requested back end or number type."""
    kind, low = _kind(config, device), low_precision(device)
    if kind == "reference":  # plain torch multiplies float16 on any device, however slowly
        low = replace(low, why_no_half=None)
    return backend_of(kind, device, choose_precision(config, low))


def backend_of(kind: str, device: torch.device, precision: Precision) -> Backend:
    """The back end with the name `kind`."""
    if kind == "cpu":
        return CpuBackend(precision)
    return (CudaBackend if kind == "cuda" else Reference)(device, precision)


def planned_backend(precision: Precision) -> Backend:
    """The back end of a plan for accelerators that this machine does not have; it only gives estimates."""
    return CudaBackend(torch.device("cpu"), precision)


def _kind(config: Config, device: torch.device) -> str:
    requested = config.model.backend
    if requested == "auto":
        return device.type if device.type in ("cpu", "cuda") else "reference"
    if requested == "cuda" and device.type != "cuda":
        message = f"cuda is requested, and this run is on {device.type}: {_why_no_gpu()}"
        hint = "--set model.backend=auto"
        raise MachineError(Problem(code="model.backend-missing", message=message, where="model.backend", hint=hint))
    return requested


def unused_gpu_note(config: Config, device: torch.device) -> str | None:
    """A message if this machine has a GPU that torch cannot use; None if there is no GPU or the config excludes it."""
    if config.model.backend != "auto" or device.type != "cpu" or torch.version.cuda is None:
        return None
    reason = _why_no_gpu()
    return None if any(text in reason for text in _NO_GPU) else f"the GPU is not used, the processor is: {reason}"


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # for example, the driver is too old for this torch
        return str(error).strip().splitlines()[0][:200]
    return _HIDDEN


def low_precision(device: torch.device) -> LowPrecision:
    """Whether this device multiplies bfloat16, and whether that is faster than float32."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return LowPrecision(has, has, "the GPU multiplies bfloat16" if has else "this GPU has no bfloat16 products")
    return LowPrecision.measured(_cached_speedup() if device.type == "cpu" else bf16_speedup(device))


def _cached_speedup() -> float:
    """`bf16_speedup` of this processor, from an earlier run or measured now."""
    limits = [f"{name}={os.environ.get(name, '')}" for name in _LIMITS]
    key = " ".join([f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", processor_id(), *limits])
    path = cache_folder() / "number-types.json"
    results = cached_measurements(
        path, [key], lambda _: (bf16_speedup(torch.device("cpu")),), count=1, is_conclusive=lambda numbers: _is_conclusive(numbers[0])
    )
    return results[key][0]


def _is_conclusive(speedup: float) -> bool:
    return not _INCONCLUSIVE[0] < speedup < _INCONCLUSIVE[1]


def bf16_speedup(device: torch.device) -> float:
    """The factor by which bfloat16 matrix products are faster than float32 ones, from the fastest of alternating trials of each.

    Other work on the machine disturbs trials, so an inconclusive result gets more of them. A few trials are enough if bfloat16 is emulated;
    the first one is a warm-up. Takes 20 to 600 ms.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for trial in range(_MAX_TRIALS):
        for dtype in best:
            a, b = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device), torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for an asynchronous device
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        speedup = best[torch.float32] / best[torch.bfloat16]
        if (trial >= _MIN_TRIALS and speedup < 1 / _EMULATED) or (trial >= _TRIALS and _is_conclusive(speedup)):
            break
    return speedup
