"""Where and with what a run was made: versions, machine and command, for environment.json. No user names, no environment variables."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("llamahome", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def write_environment(path: Path, command: Sequence[str]) -> None:
    """Write environment.json: what one needs to know to repeat the run, or to explain why it differs."""
    content = {
        "command": list(command),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _accelerators(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _accelerators() -> list[str]:
    """Names of this machine's accelerators, as far as torch knows them."""
    if not torch.accelerator.is_available():
        return []
    module: Any = torch.get_device_module(torch.accelerator.current_accelerator())
    found = torch.accelerator.device_count()
    return [module.get_device_name(i) for i in range(found)] if hasattr(module, "get_device_name") else [module.__name__] * found


def _processor() -> str:
    """The processor's name as the system tells it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
