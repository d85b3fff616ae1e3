"""Writes GGUF files: a trained model, or its adapter alone. Tensors are made, quantised and written one at a time."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.architectures import Architecture, add_metadata, architecture_of, as_stored, laid_out, rotary_tensors
from llamahome.model.export.experts import expert_of
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.vocabulary import TokenizerFacts, add_vocabulary, read_vocabulary

QUANTS = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
"""What --quant names for GGUF: the type of matrices, and the file's type."""
_FOUR_AND_FIVE = (Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)
_HEAD = "output.weight"
_EMBEDDINGS = ("token_embd.weight", _HEAD)


def write_gguf(path: Path, weights: TrainedWeights, config: Mapping[str, Any], tokenizer: TokenizerFacts, *, quant: str, name: str) -> None:
    """Write the trained model as one GGUF file. Raises ConfigError where llama.cpp cannot compute it as it was trained."""
    architecture = architecture_of(config)
    rows = next(shape[0] for name, shape in weights.shapes.items() if name.endswith("embed_tokens.weight"))
    vocabulary = read_vocabulary(tokenizer.content, rows)
    kind, file_type = QUANTS[quant]
    names = {tensor: _name(tensor, architecture, int(config["num_hidden_layers"])) for tensor in weights.shapes}
    if config.get("tie_word_embeddings", False):
        names = {tensor: found for tensor, found in names.items() if found != _HEAD}
    extra = rotary_tensors(config)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, config, rows=rows)
    add_vocabulary(writer, vocabulary, tokenizer)
    makers: dict[str, _Made] = {}
    for found, tensors in _by_place(names).items():
        shape = weights.shapes[tensors[0]]
        if expert_of(tensors[0]) is not None:
            makers[found] = _Made(partial(_stacked, weights, tensors), (len(tensors), *shape), type_of(found, shape, kind))
        else:
            makers[found] = _Made(partial(_laid_out, weights, tensors[0], config, architecture), shape, type_of(found, shape, kind))
    for found, factors in extra.items():
        makers[found] = _Made(partial(_given, factors), tuple(factors.shape), Type.F32)
    _write(writer, makers)


@dataclass(frozen=True)
class _Made:
    """A tensor of a file before it is made."""

    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    kind: Type


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _by_place(names: Mapping[str, str]) -> dict[str, list[str]]:
    """The tensors of each place in the file: one, or those of all experts in their order."""
    places: dict[str, list[str]] = {}
    for tensor, found in names.items():
        places.setdefault(found, []).append(tensor)
    return {found: sorted(tensors, key=lambda tensor: (expert_of(tensor) or ("", 0))[1]) for found, tensors in places.items()}


def _stacked(weights: TrainedWeights, tensors: Sequence[str]) -> Tensor:
    return torch.stack([weights.read(tensor) for tensor in tensors])


def _laid_out(weights: TrainedWeights, tensor: str, config: Mapping[str, Any], architecture: Architecture) -> Tensor:
    return laid_out(tensor, weights.read(tensor), config, architecture)


def _name(tensor: str, architecture: Architecture, layers: int) -> str:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    stack = expert_of(tensor)
    name = stack[0] if stack is not None else tensor
    found = gguf.get_tensor_name_map(kinds[architecture.name], layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        message = f"llama.cpp has no place for the tensor {tensor} in a model of the family {architecture.name}"
        raise ConfigError(Problem(code="export.unsupported", message=message, where="--to", hint="--to merged"))
    return str(found)


def type_of(name: str, shape: tuple[int, ...], kind: Type) -> Type:
    """The type of one tensor: float32 for vectors and routers, 8 bits for embeddings of 4- and 5-bit files, float16 where no block fits."""
    if len(shape) < 2 or "ffn_gate_inp" in name:
        return Type.F32
    if kind in _FOUR_AND_FIVE and name in _EMBEDDINGS:
        kind = Type.Q8_0
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if shape[-1] % block == 0 else Type.F16


def _write(writer: Any, makers: Mapping[str, _Made]) -> None:
    for name, made in makers.items():
        shape, kind = made.shape, made.kind
        if kind in (Type.F32, Type.F16):
            dtype = np.dtype(np.float32 if kind == Type.F32 else np.float16)
            writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        else:
            stored = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, made in makers.items():
            writer.write_tensor_data(_stored(name, made.make(), made.kind))
    finally:
        writer.close()


def _stored(name: str, tensor: Tensor, kind: Type) -> Any:
    array = tensor.to(torch.float32).contiguous().numpy()
    if not np.isfinite(array).all():
        raise ConfigError(Problem(code="model.not-finite", message=f"{name} holds NaN or infinity", where="--to"))
    if kind == Type.F16 and np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
        message = f"{name} holds a number that float16 cannot hold"
        raise ConfigError(Problem(code="export.out-of-range", message=message, where="--quant", hint="--quant bf16"))
    return array if kind == Type.F32 else array.astype(np.float16) if kind == Type.F16 else gguf.quantize(array, kind)


def write_adapter_gguf(path: Path, weights: TrainedWeights, config: Mapping[str, Any], *, name: str) -> None:
    """Write the LoRA matrices alone, as llama.cpp's --lora takes them. Raises ConfigError where it cannot compute the adapter.

    llama.cpp multiplies by alpha / rank, with one alpha for the file. Alpha is written as 1, and B holds the rest of each scale.
    """
    architecture = architecture_of(config)
    if not weights.plain:
        message = (
            "an adapter with DoRA, trained tokens or layers saved whole has no form of its own in GGUF; the model file holds them merged"
        )
        raise ConfigError(Problem(code="export.unsupported", message=message, where="--to"))
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    makers: dict[str, _Made] = {}
    for tensor in weights.changed:
        found = _name(tensor, architecture, int(config["num_hidden_layers"]))
        a_shape, b_shape = weights.lora_shapes(tensor)
        makers[f"{found}.lora_a"] = _Made(partial(_matrix_a, weights, tensor), a_shape, Type.F32)
        makers[f"{found}.lora_b"] = _Made(partial(_matrix_b, weights, tensor, config, architecture), b_shape, Type.F32)
    _write(writer, makers)


def _matrix_a(weights: TrainedWeights, tensor: str) -> Tensor:
    return weights.lora(tensor)[0]()[0]


def _matrix_b(weights: TrainedWeights, tensor: str, config: Mapping[str, Any], architecture: Architecture) -> Tensor:
    matrices, scale = weights.lora(tensor)
    rank = weights.lora_shapes(tensor)[0][0]
    return laid_out(tensor, matrices()[1] * (scale * rank), config, architecture)


class GgufWeights:
    """The weights of a GGUF file by the names and in the layout of transformers: what `write_gguf` wrote, read again."""

    def __init__(self, path: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
        """`names` are the tensors of the model in transformers' names."""
        self._config, self._architecture = config, architecture_of(config)
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        layers = int(config["num_hidden_layers"])
        self._names = {name: _name(name, self._architecture, layers) for name in names}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._names.get(name) in self._tensors

    def read(self, name: str) -> Tensor:
        """One tensor in float32."""
        tensor = self._tensors[self._names[name]]
        data, shape, stack = tensor.data, tuple(int(size) for size in reversed(tensor.shape)), expert_of(name)
        if stack is not None:
            data, shape = data[stack[1]], shape[1:]
        values = gguf.dequantize(data, tensor.tensor_type).reshape(shape)
        return as_stored(name, torch.from_numpy(np.array(values, dtype=np.float32)), self._config, self._architecture)


def gguf_config(folder: Path) -> dict[str, Any]:
    """The text part of config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config


def file_name(name: str, quant: str) -> str:
    """A file name that says what is in it: my-run-q8_0.gguf."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-') or 'model'}-{quant}.gguf"
