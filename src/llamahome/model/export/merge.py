"""A base and its adapter as one model, tensor by tensor in float32.

Plain LoRA, rank-stabilised LoRA, DoRA, VeRA, rank and alpha patterns, trained tokens and modules saved whole are merged from the files
alone. The peak memory is the largest tensor. Other adapters (of fused experts, with biases) raise `NotStreamable`: they are merged in
memory.
Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353; VeRA, arXiv 2310.11454; the names of PEFT's files.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamahome.errors import ConfigError, Problem
from llamahome.model.export.quantized import open_weights
from llamahome.model.export.weightstore import WeightStore
from llamahome.model.vocabulary import rows_needed

_PREFIX = "base_model.model."
_SHARED = ("base_model.vera_A", "base_model.vera_B")
"""The matrices that all layers of VeRA share."""
_ROWS = "token_adapter.trainable_tokens_delta"


class NotStreamable(Exception):
    """The adapter holds something that only PEFT can merge, in memory; the text says what."""


@dataclass
class Lora:
    """One adapted weight: `scale * B @ A` is added, and with DoRA each row gets its `magnitude`.

    With VeRA, A is the first columns of a matrix times `inner` [R], and B the first rows of another times `outer` [O].
    """

    scale: float
    a: str = ""
    b: str = ""
    magnitude: str = ""
    inner: str = ""
    outer: str = ""


@dataclass
class Changes:
    """What an adapter changes of its base, by the name of the base's tensor."""

    loras: dict[str, Lora] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    """Rows that are replaced, and the adapter's tensor that holds them."""
    whole: dict[str, str] = field(default_factory=dict)
    """Tensors that are replaced: the adapter's tensor."""


class TrainedWeights:
    """The weights of a trained model, read one at a time: those of a folder, with an adapter merged if there is one."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        """Raises NotStreamable, and ConfigError when adapter and base do not fit each other or cannot be read."""
        self.base = open_weights(base)
        self._adapter = WeightStore(adapter, ["adapter_model.safetensors"]) if adapter is not None else None
        settings = _read_json(adapter / "adapter_config.json") if adapter is not None else {}
        self._transposed = bool(settings.get("fan_in_fan_out"))
        self._changes = _changes_of(settings, self._adapter, self.base) if self._adapter is not None else Changes()
        self._grown = rows_needed(settings)
        self.shapes = {name: self._shape(name) for name in self.base.tensors}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.tensors[name].shape
        return (max(shape[0], self._grown), *shape[1:]) if name in self._changes.rows else shape

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding if the adapter made it larger, else None."""
        grown = [self.shapes[name][0] for name in self._changes.rows if self.shapes[name][0] > self.base.tensors[name].shape[0]]
        return max(grown, default=None)

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the adapter changes."""
        return sorted({*self._changes.loras, *self._changes.rows, *self._changes.whole})

    @property
    def plain(self) -> bool:
        """Whether the adapter is LoRA alone, which can also be computed beside the base."""
        changes = self._changes
        return not (changes.rows or changes.whole or self._transposed or any(lora.magnitude for lora in changes.loras.values()))

    def lora(self, name: str) -> tuple[Callable[[], tuple[Tensor, Tensor]], float]:
        """A function that reads the matrices A and B of an adapted weight, and their scale."""
        lora = self._changes.loras[name]
        return lambda: self._factors(name), lora.scale

    def lora_shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        assert self._adapter is not None
        return _shapes(self._changes.loras[name], self._adapter, *self._sides(name))

    def _sides(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of an adapted weight."""
        return _sides(self.base.tensors[name].shape, transposed=self._transposed)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] of an adapted weight, in float32."""
        lora, adapter, (rows, columns) = self._changes.loras[name], self._adapter, self._sides(name)
        assert adapter is not None
        a, b = adapter.read(lora.a).float(), adapter.read(lora.b).float()
        if not lora.inner:
            return a, b
        inner_R, outer_O = adapter.read(lora.inner).float(), adapter.read(lora.outer).float()
        return inner_R[:, None] * a[:, :columns], outer_O[:, None] * b[:rows]

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor of the base."""
        return self.base.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The merged tensor: float32 if it holds floating-point numbers."""
        stored = self.base.read(name)
        weight = stored.float() if stored.is_floating_point() else stored
        if self._adapter is None:
            return weight
        if (whole := self._changes.whole.get(name)) is not None:
            weight = self._adapter.read(whole).float()
        if (lora := self._changes.loras.get(name)) is not None:
            weight = self._with_lora(name, weight, lora)
        if (change := self._changes.rows.get(name)) is not None:
            weight = self._with_rows(weight, *change)
        return weight

    def _with_lora(self, name: str, weight: Tensor, lora: Lora) -> Tensor:
        assert self._adapter is not None
        a, b = self._factors(name)
        if self._transposed:
            weight = weight.T.contiguous()
        weight = torch.addmm(weight, b, a, alpha=lora.scale, out=weight)
        if lora.magnitude:
            magnitude = self._adapter.read(lora.magnitude).float()
            weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
        return weight.T.contiguous() if self._transposed else weight

    def _with_rows(self, weight: Tensor, rows: list[int], name: str) -> Tensor:
        assert self._adapter is not None
        if self._grown > weight.shape[0]:
            more = weight.mean(0).expand(self._grown - weight.shape[0], -1)
            weight = torch.cat([weight, more])
        weight[rows] = self._adapter.read(name).float()
        return weight


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(code="model.unreadable", message=f"{path.name} cannot be read", where=str(path.parent))) from error


def _changes_of(settings: Mapping[str, Any], adapter: WeightStore, base: WeightStore) -> Changes:
    if (kind := settings.get("peft_type", "LORA")) not in ("LORA", "VERA"):
        raise NotStreamable(f"its kind is {kind}")
    if kind == "VERA" and not all(key in adapter for key in _SHARED):
        raise NotStreamable("it was saved without the matrices that its layers share")
    if settings.get("target_parameters"):
        raise NotStreamable("it adapts fused experts")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        raise NotStreamable("it trains biases")
    changes = Changes()
    trained_rows = settings.get("trainable_token_indices") or {}
    if not isinstance(trained_rows, Mapping):
        raise NotStreamable("it names trained tokens without their layer")
    for key in (key for key in adapter.tensors if key not in _SHARED):
        path = key.removeprefix(_PREFIX)
        if (match := re.fullmatch(r"(.+)\.lora_(A|B)\.weight", path)) is not None:
            name = _base_name(f"{match[1]}.weight", base)
            lora = changes.loras.setdefault(name, Lora(_scale(settings, match[1])))
            if match[2] == "A":
                lora.a = key
            else:
                lora.b = key
        elif (match := re.fullmatch(r"(.+)\.lora_magnitude_vector(?:\.weight)?", path)) is not None:
            name = _base_name(f"{match[1]}.weight", base)
            changes.loras.setdefault(name, Lora(_scale(settings, match[1]))).magnitude = key
        elif (match := re.fullmatch(r"(.+)\.vera_lambda_(b|d)", path)) is not None:
            name = _base_name(f"{match[1]}.weight", base)
            lora = changes.loras.setdefault(name, Lora(1.0, *_SHARED))
            if match[2] == "d":
                lora.inner = key
            else:
                lora.outer = key
        elif path.endswith("." + _ROWS):
            module = path.removesuffix("." + _ROWS)
            layer = next((layer for layer in trained_rows if module == layer or module.endswith("." + layer)), None)
            if layer is None:
                raise NotStreamable(f"no rows are named for {module}")
            changes.rows[_base_name(f"{module}.weight", base)] = ([int(row) for row in trained_rows[layer]], key)
        elif (match := re.fullmatch(r"(.+?)\.(?:modules_to_save\.)?(weight|bias)", path)) is not None:
            changes.whole[_base_name(f"{match[1]}.{match[2]}", base)] = key
        else:
            raise NotStreamable(f"it holds {key}")
    _require_fitting(changes, adapter, base, transposed=bool(settings.get("fan_in_fan_out")))
    return changes


def _base_name(name: str, base: WeightStore) -> str:
    """The name of a weight in the base's files, which may have another prefix than the module has in memory."""
    if name in base:
        return name
    candidates = [known for known in base.tensors if known.endswith("." + name) or name.endswith("." + known)]
    if len(candidates) != 1:
        raise NotStreamable(f"the base's files have no tensor for {name}")
    return candidates[0]


def _scale(settings: Mapping[str, Any], module: str) -> float:
    rank = _of_pattern(settings.get("rank_pattern"), module, settings.get("r"))
    alpha = _of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
    try:
        return float(alpha) / (math.sqrt(float(rank)) if settings.get("use_rslora") else float(rank))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise NotStreamable(f"its rank is {rank!r} and its alpha {alpha!r}") from error


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the module's name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _sides(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, int]:
    """Outputs and inputs of a linear layer whose weight has this shape."""
    return (shape[-1], shape[0]) if transposed and len(shape) == 2 else (shape[0], shape[-1])


def _shapes(lora: Lora, adapter: WeightStore, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a layer of `rows` outputs and `columns` inputs; those that VeRA's layers share may be larger."""
    a, b = adapter.tensors[lora.a].shape, adapter.tensors[lora.b].shape
    return ((a[0], min(a[1], columns)), (min(b[0], rows), b[1])) if lora.inner else (a, b)


def _require_fitting(changes: Changes, adapter: WeightStore, base: WeightStore, *, transposed: bool) -> None:
    """ConfigError unless every change has the shape of the tensor that it changes."""
    for name, lora in changes.loras.items():
        shape = base.tensors[name].shape
        rows, columns = _sides(shape, transposed=transposed)
        if len(shape) != 2:
            raise NotStreamable(f"{name} is not a matrix")
        if not lora.a or not lora.b or bool(lora.inner) != bool(lora.outer):
            raise ConfigError(_unfit(adapter.folder, f"it has only one of the two matrices for {name}"))
        a, b = _shapes(lora, adapter, rows, columns)
        vectors = [adapter.tensors[key].shape for key in (lora.inner, lora.outer) if key]
        if a[-1] != columns or b[0] != rows or a[0] != b[-1] or vectors not in ([], [(a[0],), (rows,)]):
            raise ConfigError(
                _unfit(adapter.folder, f"its matrices for {name} are {list(b)} and {list(a)}, the base's weight is {list(shape)}")
            )
    for name, key in changes.whole.items():
        if adapter.tensors[key].shape != base.tensors[name].shape:
            raise ConfigError(
                _unfit(adapter.folder, f"{name} is {list(adapter.tensors[key].shape)}, in the base {list(base.tensors[name].shape)}")
            )
    for name, (rows_, key) in changes.rows.items():
        shape, base_shape = adapter.tensors[key].shape, base.tensors[name].shape
        if shape != (len(rows_), base_shape[-1]):
            raise ConfigError(_unfit(adapter.folder, f"{key} is {list(shape)} for {len(rows_)} rows of {list(base_shape)}"))


def _unfit(folder: Path, why: str) -> Problem:
    return Problem(code="model.weights-do-not-fit", message=f"the adapter does not fit this base: {why}", where=str(folder))
