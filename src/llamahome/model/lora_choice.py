"""What of a model LoRA trains beside the default: layers by number, ranks and scales by pattern, and modules that are trained whole.

PEFT makes all of it; the functions here refuse names that select nothing. PEFT would accept them without a word.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.errors import ConfigError, Problem
from llamahome.model.load import decoder_layers
from llamahome.model.packed_weight import PackedWeight
from llamahome.model.packing import decoder_of
from llamahome.model.targets import ChosenTargets, kind, matrices


def in_layers(model: PreTrainedModel, chosen: ChosenTargets, layers: Sequence[int | str]) -> ChosenTargets:
    """The `chosen` targets inside the decoder layers with these numbers, like [0, "20-29"]; all of them if `layers` is empty.

    Raises ConfigError if the model has no such layer, or nothing is chosen in them.
    """
    if not layers:
        return chosen
    paths = {id(module): path for path, module in model.named_modules()}
    prefixes = [f"{paths[id(layer)]}." for layer in decoder_layers(model)]
    numbers = sorted({number for each in layers for number in _range(each)})
    if numbers[-1] >= len(prefixes):
        message = f"there is no layer {numbers[-1]}: this model has the layers 0 to {len(prefixes) - 1}"
        hint = f"--set 'lora.layers=[{numbers[0]}-{len(prefixes) - 1}]'" if numbers[0] < len(prefixes) else "--set lora.layers=[]"
        raise ConfigError(Problem(code="lora.no-such-layer", message=message, where="lora.layers", hint=hint))
    wanted = tuple(prefixes[number] for number in numbers)
    kept = ChosenTargets(*([path for path in kind if path.startswith(wanted)] for kind in (chosen.modules, chosen.parameters)))
    if not kept.modules and not kept.parameters:
        message = (
            f"lora.target_modules selects nothing in these layers, but {chosen.modules[0] if chosen.modules else chosen.parameters[0]}"
        )
        raise ConfigError(Problem(code="lora.no-such-layer", message=message, where="lora.layers", hint="--set lora.layers=[]"))
    return kept


def _range(layers: int | str) -> range:
    if isinstance(layers, int):
        return range(layers, layers + 1)
    first, _, last = layers.partition("-")
    return range(int(first), int(last) + 1)


def require_patterns(model: PreTrainedModel, key: str, patterns: Iterable[str], chosen: ChosenTargets) -> None:
    """Raise ConfigError if a pattern of `key` (lora.rank_pattern, lora.alpha_pattern) matches no chosen path, by PEFT's rule."""
    paths = [*chosen.modules, *chosen.parameters]
    kinds = sorted({kind(each) for each in matrices(model) if each.path in chosen.modules})
    for pattern in patterns:
        try:
            found = any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths)
        except re.error:
            found = False
        if not found:
            near = difflib.get_close_matches(pattern, kinds, n=1)
            message = f"{pattern!r} matches no layer that gets an adapter; there are {', '.join(kinds)}"
            hint = f"write {near[0]}" if near else None
            raise ConfigError(Problem(code="lora.no-such-module", message=message, where=f"lora.{key}", hint=hint))


def require_whole(model: PreTrainedModel, names: Sequence[str], chosen: ChosenTargets, new_rows: Sequence[int]) -> None:
    """Raise ConfigError unless each of `names` (lora.modules_to_save) is the end of the path of a module that may be trained whole."""
    usable = {id(module) for module in (*decoder_of(model).modules(), model.get_output_embeddings())}
    held = {path: module for path, module in model.named_modules() if id(module) in usable and path}
    owners = {path: module for path, module in held.items() if any(True for _ in module.parameters(recurse=False))}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    refuse_quantized(names, [path for path, module in owners.items() if isinstance(getattr(module, "weight", None), PackedWeight)])
    for name in names:
        found = {path: module for path, module in owners.items() if path == name or path.endswith("." + name)}
        message, hint, code = "", None, "lora.no-such-module"
        if not found:
            last = sorted({path.rpartition(".")[2] for path in owners})
            near = difflib.get_close_matches(name, last, n=1)
            message = f"this model has no module {name!r} with weights of its own; there are {', '.join(last)}"
            hint = f"--set 'lora.modules_to_save=[{near[0]}]'" if near else None
        elif twice := sorted({*found} & {*chosen.modules}):
            message = f"{twice[0]} gets an adapter, and is to be trained whole too"
            hint = "name it in one of lora.target_modules and lora.modules_to_save"
        elif new_rows and any(module is table for module in found.values() for table in tables):
            message, code = (
                f"{name} is to be trained whole, and its new rows alone (model.new_tokens, model.resize_embeddings)",
                "lora.rows-twice",
            )
            hint = "--set lora.modules_to_save=[]"
        if message:
            raise ConfigError(Problem(code=code, message=message, where="lora.modules_to_save", hint=hint))


def refuse_quantized(names: Sequence[str], quantized: Sequence[str]) -> None:
    """Raise ConfigError if one of `names` (lora.modules_to_save) is the end of the path of one of the layers `quantized`."""
    packed = next((path for name in names for path in quantized if path == name or path.endswith("." + name)), None)
    if packed is not None:
        message = f"{packed} is to be trained whole, and its weight is frozen in few bits"
        hint = "--set model.quantization=null, or name no layer of the decoder in lora.modules_to_save"
        raise ConfigError(Problem(code="lora.whole-quantized", message=message, where="lora.modules_to_save", hint=hint))


def shares_weight(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether `names` has the embedding or the head of a model where both are one weight: PEFT then trains one copy for both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is embedding or module is head]
    return head.weight is embedding.weight and any(path == name or path.endswith("." + name) for path in paths for name in names)


def cast_whole_modules(model: nn.Module) -> None:
    """Convert the trained copies of whole modules to float32, like all trained weights; their outputs keep the dtype of the base."""
    for wrapper in list(model.modules()):
        copies: Any = getattr(wrapper, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict):  # PEFT's wrapper of a module that is trained whole has one
            continue
        stored = next(wrapper.get_submodule("original_module").parameters()).dtype
        for copy in copies.values():
            copy.float()
            if stored != torch.float32:
                copy.register_forward_pre_hook(_widen)
                copy.register_forward_hook(lambda _, __, out, stored=stored: out.to(stored))


def _widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)


def with_every_name(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values` of the weights of `model`, also under the other names of a weight that has several: PEFT saves it under each."""
    every = list(model.named_parameters(remove_duplicate=False))  # once: a pass replaces sharded parameters while another thread saves
    first: dict[int, str] = {}
    for name, weight in every:
        first.setdefault(id(weight), name)
    return dict(values) | {name: values[first[id(weight)]] for name, weight in every if first[id(weight)] in values}
