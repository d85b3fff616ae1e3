"""Save and load trained models: a PEFT folder for an adapter, a Hugging Face folder for a fully trained model; safetensors only.

The folder also holds the auxiliary files of the base (auxiliary_files.py), so that any tool can load it.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.distributed.tensorfiles import TensorSlices, WriterShare, write_files
from llamahome.errors import ConfigError, Problem
from llamahome.model.adapter_folder import CONFIG, adapter_config, find_base, is_adapter
from llamahome.model.auxiliary_files import copy_auxiliary_files
from llamahome.model.limits import rows_of_adapter
from llamahome.model.load import find_model, load_model
from llamahome.model.lora import does_not_fit, quiet_peft
from llamahome.model.lora_choice import cast_whole_modules, with_every_name
from llamahome.model.lora_init import split_starts, with_starts
from llamahome.model.lora_layers import use_own_forward
from llamahome.model.lora_vera import projections_of
from llamahome.model.shard import Placement
from llamahome.model.stream import hold_tables
from llamahome.model.targets import is_adapted
from llamahome.model.vocabulary import cast_trained_rows, grow_embeddings, rows_needed
from llamahome.model.weightfiles import check_adapter_file, check_finite, write_index
from llamahome.rundir import as_typed

SavedModel: TypeAlias = PeftModel | PreTrainedModel
"""A PEFT wrapper, of which the adapter is saved, or a fully trained model."""


def changing(model: SavedModel) -> dict[str, Tensor]:
    """The saved tensors that training changes, by name in the state dict: trained weights, and the buffers of a fully trained model."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained if isinstance(model, PeftModel) else trained | saved_buffers(model)


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of `model` that a fully trained model is saved with. Not while another thread trains it: FSDP2 would reshard layers."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def save_model(model: SavedModel, folder: Path, *, base: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write `model` into `folder`, which is created if it does not exist: only the adapter, or all weights in float32.

    `weights` are copies of the tensors that `changing` returns; they are written instead of the current ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # save_embedding_layers=False, or PEFT would read the base's config on the hub to see whether its vocabulary was resized.
        values = with_starts(model, with_every_name(model, weights if weights is not None else changing(model))) | projections_of(model)
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=values)
        _sort_sets(model, folder / CONFIG)
        (folder / "README.md").unlink(missing_ok=True)  # an empty model card template
    else:
        model.save_pretrained(folder, save_original_format=False, state_dict=dict(weights) if weights is not None else None)
    copy_auxiliary_files(base, folder)


def _sort_sets(model: PeftModel, path: Path) -> None:
    """Sort the lists in the written config that are sets in PEFT, whose order differs from process to process: a run writes one file."""
    names = {name for config in model.peft_config.values() for name, value in vars(config).items() if isinstance(value, set)}
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    written |= {name: sorted(written[name]) for name in names & written.keys()}
    path.write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")


def save_in_parts(
    model: PreTrainedModel, folder: Path, *, base: Path, weights: Mapping[str, Tensor | TensorSlices], part: WriterShare
) -> list[Path]:
    """Write a fully trained model as `save_model` does, but each process writes some of the files; all processes call it.

    `weights` are all tensors that are saved. Those of `model` are not read, because another thread may train it meanwhile.
    Returns the weight files that this process wrote. The first process also writes the config and the other files.
    """
    written = write_files(folder, "model", weights, part=part, metadata={"format": "pt"})
    if part.number == 0:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = [type(model).__name__], torch.float32
        config.save_pretrained(folder)
        if len(set(written.file_of.values())) > 1:
            write_index(folder, written.file_of, nbytes=sum(tensor.nbytes for tensor in weights.values()))
        copy_auxiliary_files(base, folder)
    return written.mine


def restore_model(model: SavedModel, folder: Path, placement: Placement | None = None) -> None:
    """Load the trained weights in `folder` into a model of the same shape, in place; the placement may differ from the saved run's."""
    if isinstance(model, PeftModel):
        try:
            adapter = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            message = f"the adapter cannot be read: {str(error).splitlines()[0][:200]}"
            raise ConfigError(Problem(code="model.unreadable", message=message, where=str(folder))) from error
        _require_same_shapes(folder, adapter, with_starts(model, get_peft_model_state_dict(model, save_embedding_layers=False)))
        set_peft_model_state_dict(model, split_starts(model, adapter))
        return
    saved = dict(load_model(folder, dtype=torch.float32, device=torch.device("cpu")).named_parameters())
    _require_same_shapes(folder, saved, dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in (placement.parameters if placement is not None else dict(model.named_parameters())).items():
            parameter.copy_(placement.part(name, saved[name]) if placement is not None else saved[name])


def _require_same_shapes(folder: Path, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless the saved weights have exactly the names and shapes of the expected ones."""
    have, want = ({name: tuple(weight.shape) for name, weight in weights.items()} for weights in (saved, expected))
    if different := sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name)):
        name = different[0]
        message = f"{len(different)} weights differ in shape from this model's: {name} is {have.get(name)} there, {want.get(name)} here"
        hint = "resume with the settings of the run itself"
        raise ConfigError(Problem(code="model.weights-do-not-fit", message=message, where=str(folder), hint=hint))


def trained_rows(folder: Path) -> int:
    """The number of embedding rows that the adapter in `folder` needs; 0 if it trains no rows or `folder` holds no adapter."""
    return max(rows_needed(adapter_config(folder)), *rows_of_adapter(folder)[0], 0) if is_adapter(folder) else 0


def fit_rows(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Resize the embedding and head of `model` to the rows of the adapter in `folder`; ConfigError if the adapter lacks their values."""
    embedding, head = (layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    before, (saved, adapted) = embedding.shape[0], rows_of_adapter(folder)
    saved_rows = max(saved) if len(saved) >= (1 if head is embedding else 2) else 0
    grow_embeddings(model, max(rows_needed(adapter_config(folder)), saved_rows))
    rows = model.get_input_embeddings().weight.shape[0]
    if other := sorted(number for number in (*saved, *adapted) if number != rows):
        message = f"it was trained on a model with {other[0]:,} rows for tokens, and {as_typed(base)} has {before:,}"
        raise ConfigError(Problem(code="model.other-vocabulary", message=message, where=str(folder)))


def open_trained(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None],
    base: str | None = None,
    keep_bytes: int | None = None,
) -> PreTrainedModel:
    """Load a model to chat with or to evaluate: a base, a fully trained model, or an adapter on its base (not merged, float32).

    `base` replaces the base that the adapter's folder records. With `keep_bytes` the weights are streamed, as in `load_model`.
    """
    base_folder = find_base(folder, typed=base, say=say) if is_adapter(folder) else find_model(str(folder), say=say)
    try:
        model = load_model(base_folder, dtype=dtype, device=device, keep_bytes=keep_bytes)
    except ConfigError as error:  # without the hints, which name another model
        raise ConfigError([replace(problem, hint=None) for problem in error.problems]) from error
    if not is_adapter(folder):
        return model
    check_adapter_file(folder)
    if not can_switch_off(folder):
        hold_tables(model)
    fit_rows(model, folder, base_folder)
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(does_not_fit(folder, error)) from error
    _merge_head(adapted)
    cast_trained_rows(adapted)
    cast_whole_modules(adapted)
    check_finite(adapted, folder)
    use_own_forward(adapted)
    return adapted.get_base_model()


def can_switch_off(folder: Path) -> bool:
    """Whether `without_adapter` leaves the base: the adapter in `folder` changes neither the embedding nor the output head."""
    return not trained_rows(folder) and not rows_of_adapter(folder)[1]


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[bool]:
    """Switch off the adapter of a model that `open_trained` opened, so that it computes as its base; True if it has one."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
            layer.requires_grad_(False)  # PEFT makes adapters trainable when it switches them on


def _merge_head(adapted: PeftModel) -> None:
    """Merge an adapter of the output head into its weight, which the loss and generation read directly; a tied weight is copied first."""
    model: Any = adapted.get_base_model()
    head = model.get_output_embeddings()
    if not is_adapted(head):
        return
    _untie(model, head)
    head.merge()
    model.set_output_embeddings(head.get_base_layer())


def _untie(model: Any, head: Any) -> None:
    """Give an adapted head a weight of its own if it has that of the embedding, which the adapter does not change."""
    layer = head.get_base_layer()
    if layer.weight is model.get_input_embeddings().weight:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def wrap_plain(model: PreTrainedModel, folder: Path, *, merge: bool = False) -> PreTrainedModel:
    """`model` with the adapter in `folder` as PEFT alone computes it, or merged into the weights; unchanged if the folder holds no adapter.

    Raises ConfigError when PEFT cannot load it.
    """
    if not is_adapter(folder):
        return model
    check_adapter_file(folder)
    grow_embeddings(model, trained_rows(folder))
    try:
        with quiet_peft():
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
            own = adapted.get_base_model()
            if merge and is_adapted(own.get_output_embeddings()):
                _untie(own, own.get_output_embeddings())
            return adapted.merge_and_unload() if merge else own
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(does_not_fit(folder, error)) from error
