"""Writes a trained model as a plain Hugging Face folder: `AutoModelForCausalLM.from_pretrained` and vLLM load it without PEFT."""

import json
from pathlib import Path
from typing import Any

import torch

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.weightstore import stored_type, write_shards

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""What --quant names for weights in safetensors."""


def write_merged(folder: Path, weights: TrainedWeights, *, base: Path, dtype: torch.dtype) -> list[Path]:
    """Write weights in `dtype` and config.json into `folder`; returns the files. The other files of the model are the caller's.

    Raises ConfigError when a weight does not fit into float16.
    """

    def make(name: str) -> torch.Tensor:
        tensor = weights.read(name)
        if dtype == torch.float16 and tensor.is_floating_point() and bool((tensor.abs() > torch.finfo(torch.float16).max).any()):
            message = f"{name} holds a number that float16 cannot hold"
            raise ConfigError(Problem(code="export.out-of-range", message=message, where="--quant", hint="--quant bf16"))
        return tensor

    tensors = [(name, stored_type(weights.dtype(name), dtype), shape) for name, shape in weights.shapes.items()]
    files = write_shards(folder, tensors, make)
    config = written_config(base, dtype=dtype, vocabulary=weights.vocabulary)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*files, folder / "config.json"]


def written_config(base: Path, *, dtype: torch.dtype, vocabulary: int | None) -> dict[str, Any]:
    """config.json of the base with the type of the weights, and with more rows of the embedding where the adapter added some."""
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    texts: list[dict[str, Any]] = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    for part in texts:
        part.pop("quantization_config", None)
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
        if vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = vocabulary
    if "torch_dtype" not in config:
        config["dtype"] = name
    return config


def license_of(folder: Path) -> str | None:
    """The licence that a model folder names: in the front matter of its README.md, or as the first line of its LICENSE."""
    readme, file = folder / "README.md", folder / "LICENSE"
    if readme.is_file():
        lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()[:60]
        named = next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), "")
        if named:
            return named
    if file.is_file():
        lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[0] if lines else None
    return None
