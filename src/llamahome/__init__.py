"""llamahome teaches a language model your data: load_config, train, evaluate, open_chat, export_model. All imported on first use."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["LlamaHomeError", "__version__", "evaluate", "export_model", "load_config", "open_chat", "train"]

_HOMES = {
    "LlamaHomeError": "llamahome.errors",
    "evaluate": "llamahome.public",
    "export_model": "llamahome.public",
    "load_config": "llamahome.config.load",
    "open_chat": "llamahome.public",
    "train": "llamahome.public",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llamahome' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
