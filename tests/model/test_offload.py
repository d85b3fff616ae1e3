"""Moving inputs of layers away and back changes no bit of loss and gradients, and the inputs leave memory in between."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from tests.support.levels import kernels_or_skip
from tests.support.models import CPU, FP32, examples_of, microbatch_of, our_model, save_tiny
from torch import Tensor, nn

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.model.backends.backend import Backend, OffloadStore
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.backends.cpu.fuse import fuse
from llamahome.model.backends.cuda.backend import CudaBackend
from llamahome.model.backends.cuda.pinned_store import PinnedStore
from llamahome.model.backends.file_store import FileStore
from llamahome.model.backends.reference import Reference
from llamahome.model.load import decoder_layers
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.offload import HELD, ActivationOffload, input_bytes, offload_inputs, spared_bytes
from llamahome.model.place import place, trained_parameters
from llamahome.model.recompute import tile_blocks

LENGTHS = (41, 20, 2)
LAYERS = 5
KINDS = ("llama", "gemma2", "gpt2", "phi3", "deepseek")
STORES = ("file", "host")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind, num_hidden_layers=LAYERS) for kind in KINDS}


def store_of(name: str, folder: Path) -> OffloadStore:
    return FileStore(folder) if name == "file" else PinnedStore(CPU)


def model_of(folder: Path, *, lora: bool = True, dropout: float = 0.0) -> nn.Module:
    model = our_model(folder)
    if lora:
        add_lora(model, LoraConfig(rank=4, dropout=dropout), base="tiny", seed=1, lean=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    place(model, world=World(0, 1, 0, CPU, 1), checkpointing=True, sync_batch_norm=False)
    return model


def loss_and_gradients(model: nn.Module, backend: Backend, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    torch.manual_seed(3)
    loss = Objective(model, backend).loss_sum(microbatch_of(examples_of(lengths)))
    loss.backward()
    found = [loss.detach(), *(each.grad for each in trained_parameters(model).values() if each.grad is not None)]
    model.zero_grad()
    return found


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 4
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_inputs_that_stay(folders: dict[str, Path], tmp_path: Path, kind: str, lora: bool, store: str) -> None:
    dropout = 0.0 if kind == "deepseek" else 0.2  # PEFT adapts its experts without
    stays, moves = (model_of(folders[kind], lora=lora, dropout=dropout) for _ in range(2))
    offload = offload_inputs(moves, store_of(store, tmp_path))
    assert offload is not None
    for lengths in (LENGTHS, (7, 9), LENGTHS):  # passes of several sizes, one after the other
        assert_same_bits(loss_and_gradients(moves, Reference(CPU, FP32), lengths), loss_and_gradients(stays, Reference(CPU, FP32), lengths))
    assert offload.moved_bytes == sum(input_bytes(moves, sum(lengths), FP32) for lengths in (LENGTHS, (7, 9), LENGTHS))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradients_of_compiled_layers_in_tiles_are_those_of_inputs_that_stay(folders: dict[str, Path], tmp_path: Path, lora: bool) -> None:
    kernels = kernels_or_skip()
    backend, found = CpuBackend(FP32, kernels=kernels), []
    for store in (None, FileStore(tmp_path)):
        model = model_of(folders["llama"], lora=lora)
        fuse(model, backend, kernels=kernels)
        assert tile_blocks(model, tokens=16) == LAYERS
        if store is not None:
            offload_inputs(model, store)
        found.append(loss_and_gradients(model, backend))
    assert_same_bits(found[1], found[0])


def test_gradients_of_the_back_end_for_gpus_are_those_of_inputs_that_stay(folders: dict[str, Path]) -> None:
    backend, found = CudaBackend(CPU, FP32), []
    for moves in (False, True):
        model = model_of(folders["llama"])
        store = backend.offload_store()
        assert isinstance(store, PinnedStore)
        if moves:
            offload_inputs(model, store)
        found.append(loss_and_gradients(model, backend))
    assert_same_bits(found[1], found[0])


class Recorded:
    """A store in memory that writes down what is asked of it, by the number of the tensor."""

    place = "a list"

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.stored = 0

    def free_bytes(self) -> int | None:
        return None

    def store(self, x: Tensor, /) -> "Copy":
        self.asked.append(("store", self.stored))
        self.stored += 1
        return Copy(self, x.clone(), self.stored - 1)


class Copy:
    def __init__(self, store: Recorded, x: Tensor, number: int) -> None:
        self.recorded, self.x, self.number = store, x, number

    def fetch(self) -> None:
        self.recorded.asked.append(("fetch", self.number))

    def load(self) -> Tensor:
        self.recorded.asked.append(("load", self.number))
        return self.x


def test_each_input_is_on_its_way_back_while_the_layer_above_runs_backward(folders: dict[str, Path]) -> None:
    model, store = model_of(folders["llama"]), Recorded()
    offload_inputs(model, store)
    loss_and_gradients(model, Reference(CPU, FP32))
    upwards = [("store", number) for number in range(LAYERS)]
    downwards = [asked for number in reversed(range(1, LAYERS)) for asked in (("load", number), ("fetch", number - 1))]
    assert store.asked == [*upwards, *downwards, ("load", 0)]


def test_without_gradients_nothing_is_moved(folders: dict[str, Path]) -> None:
    model, store = model_of(folders["llama"]), Recorded()
    offload_inputs(model, store)
    batch = microbatch_of(examples_of(LENGTHS))
    Objective(model, Reference(CPU, FP32)).stats(batch)
    assert store.asked == []


@pytest.mark.parametrize("moves", [True, False])
def test_inputs_leave_memory_between_the_passes(folders: dict[str, Path], tmp_path: Path, moves: bool) -> None:
    model = model_of(folders["llama"])
    if moves:
        offload_inputs(model, FileStore(tmp_path))
    inputs: list[weakref.ref[torch.UntypedStorage]] = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    loss = Objective(model, Reference(CPU, FP32)).loss_sum(microbatch_of(examples_of(LENGTHS)))
    gc.collect()
    there = sum(each() is not None for each in inputs)
    assert len(inputs) == LAYERS and (there < HELD if moves else there == LAYERS)
    loss.backward()


def test_a_pass_that_is_given_up_leaves_the_next_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    stays, moves, backend = model_of(folders["llama"]), model_of(folders["llama"]), Reference(CPU, FP32)
    offload_inputs(moves, FileStore(tmp_path))
    expected = loss_and_gradients(stays, backend)
    given_up = Objective(moves, backend).loss_sum(microbatch_of(examples_of((30, 9))))
    del given_up
    assert_same_bits(loss_and_gradients(moves, backend), expected)


def test_a_layer_can_be_computed_again_twice(tmp_path: Path) -> None:
    offload, x = ActivationOffload(FileStore(tmp_path)), torch.randn(3, 5)
    entries = [offload.pack(x * number) for number in range(3)]
    for _ in range(2):
        assert all(torch.equal(offload.unpack(entry), x * number) for number, entry in reversed(list(enumerate(entries))))


def test_what_is_spared_is_all_inputs_but_those_in_use(folders: dict[str, Path]) -> None:
    model = our_model(folders["llama"])
    assert input_bytes(model, 100, FP32) == LAYERS * 100 * 32 * 4
    assert spared_bytes(model, 100, FP32) == (LAYERS - HELD) * 100 * 32 * 4
