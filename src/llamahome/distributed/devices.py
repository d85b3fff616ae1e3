"""The device of a process, copies of scalars from it to the host that do not block, and how it says that its memory ran out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llamahome.errors import ConfigError, Problem


def device_here(local_rank: int = 0, size: int = 1, local_size: int = 1, *, processor: bool = False) -> torch.device:
    """The device of this process: an accelerator if the machine has one and `processor` is false. Raises ConfigError."""
    if processor:
        return torch.device("cpu")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            message = f"{local_size} processes on this machine, which has {gpus} GPUs"
            hint = f"--world-size {size // local_size * gpus}"
            raise ConfigError(
                Problem(code="distributed.more-processes-than-gpus", message=message, where="distributed.world_size", hint=hint)
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if size == 1 and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "error: out of memory", "_STATUS_ALLOC_FAILED")
"""In torch's plain RuntimeErrors: on Linux and macOS, on Windows, on a GPU whose memory others use, in the libraries of a GPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


class HostCopy:
    """A copy of scalars from the device to the host. The constructor does not wait; `read` waits for the work queued before it."""

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        """`scalars` are tensors of any shape on one device, read in their order; some may be on the host."""
        device = next((scalar.device for scalar in scalars if scalar.device.type != "cpu"), torch.device("cpu"))
        flat = torch.cat([each.detach().to(device, torch.float32, non_blocking=True).reshape(-1) for each in scalars])
        self.late = device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")
        """Whether the device runs asynchronously, so that the values arrive later."""
        self._values = flat.to("cpu", non_blocking=self.late)
        self._copied = torch.Event(device=device) if self.late else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[float]:
        """The values, in order."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values
