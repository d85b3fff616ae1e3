"""Which device a process computes on."""

import torch

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
