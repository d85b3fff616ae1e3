"""llamahome teaches a language model your data: load_config, train, evaluate. Everything is imported on first use."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["LlamaHomeError", "__version__", "evaluate", "load_config", "train"]

_HOMES = {
    "LlamaHomeError": "llamahome.errors",
    "evaluate": "llamahome.pipeline",
    "load_config": "llamahome.config.load",
    "train": "llamahome.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llamahome' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
