"""The GPUs that this process may use, one for each new process; without torch, whose import takes seconds."""

import itertools
import os
import re
from pathlib import Path


def one_for_each_process(*, devices: Path = Path("/dev")) -> list[dict[str, str]]:
    """For each GPU that this process may use, the variables with which a new process uses it alone."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        numbers = sorted(int(match[1]) for path in devices.glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", path.name)))
        gpus = [str(number) for number in range(len(numbers))]
    else:
        gpus = list(itertools.takewhile(lambda gpu: gpu not in ("", "-1", "NoDevFiles"), (gpu.strip() for gpu in named.split(","))))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
