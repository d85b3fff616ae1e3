"""Writes environment.json: versions, machine, command and data of a run. No user names, no environment variables, no secrets."""

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

from llamahome import durable
from llamahome.redaction import redact, redact_words

_PACKAGES = ("llamahome", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def write_environment(path: Path, command: Sequence[str], data: Sequence[str] = ()) -> None:
    """Write environment.json, which helps to repeat the run or to explain why a second run differs; `data` are the paths of its rows."""
    content = {
        "command": redact_words(command),
        "data": [redact(each) for each in data],
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
    durable.write_whole(path, json.dumps(content, indent=2) + "\n")


def _accelerators() -> list[str]:
    """Names of the accelerators that torch finds on this machine."""
    if not torch.accelerator.is_available():
        return []
    module: Any = torch.get_device_module(torch.accelerator.current_accelerator())
    count = torch.accelerator.device_count()
    return [module.get_device_name(i) for i in range(count)] if hasattr(module, "get_device_name") else [module.__name__] * count


def _processor() -> str:
    """The processor's name, or its architecture if the system does not give a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
