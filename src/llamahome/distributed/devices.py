"""Which device a process computes on, and how its scalars come to the host without a wait."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llamahome.errors import ConfigError, Problem


def device_here(local_rank: int = 0, size: int = 1, local_size: int = 1, *, processor: bool = False) -> torch.device:
    """The device of a process: an accelerator where the machine has one and `processor` is not asked for. Raises ConfigError."""
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


class HostCopy:
    """Scalars on their way from the device to the host. Making one waits for nothing; reading waits for the work queued before it."""

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        """`scalars` are 0-dim tensors, on one device but for some that may lie on the host."""
        device = next((scalar.device for scalar in scalars if scalar.device.type != "cpu"), torch.device("cpu"))
        stacked = torch.stack([scalar.detach().to(device, torch.float32, non_blocking=True) for scalar in scalars])
        self.late = device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")
        """Whether the device works behind the host, so that the values are not there yet."""
        self._values = stacked.to("cpu", non_blocking=self.late)
        self._arrived = torch.Event(device=device) if self.late else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """The values, in their order."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._values.tolist()
        return values
