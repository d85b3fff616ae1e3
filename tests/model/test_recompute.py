"""Layers that are computed again, and feed-forward blocks in tiles, give the loss and the gradients of the plain pass."""

from pathlib import Path

import pytest
import torch
from tests.support.levels import kernels_or_skip
from tests.support.models import CPU, FP32, examples_of, microbatch_of, our_model, plain_model, save_tiny
from torch import Tensor, nn

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.model.backends.backend import Backend, Documents, Scoring
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.backends.cpu.fuse import fuse
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.reference import Reference
from llamahome.model.load import decoder_layers
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import place, trained_parameters
from llamahome.model.precision import Precision
from llamahome.model.recompute import tile_blocks

MIXED = Precision(torch.float32, torch.bfloat16, "a test")
LENGTHS = (41, 20, 2)
WHOLE, FUSED = ("gemma2", "phi3", "granite", "olmo2"), ("llama", "llama-mha", "gemma")
"""Layers that are not replaced, and layers that are."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in (*WHOLE, *FUSED, "gpt2")}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return kernels_or_skip()


def model_of(folder: Path, *, lora: bool, recompute: bool = False) -> nn.Module:
    model = our_model(folder)
    if lora:
        add_lora(model, LoraConfig(rank=4), base="tiny", seed=1, lean=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    place(model, world=World(0, 1, 0, CPU, 1), checkpointing=recompute, sync_batch_norm=False)
    return model


def loss_and_gradients(model: nn.Module, backend: Backend) -> list[Tensor]:
    loss = Objective(model, backend).loss_sum(microbatch_of(examples_of(LENGTHS)))
    loss.backward()
    return [loss.detach(), *(each.grad for each in trained_parameters(model).values() if each.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= 1e-5 * (other.norm() + 1e-6)


@pytest.mark.parametrize("tokens", [16, 62])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", [*WHOLE, "llama-mha", "gpt2"])
def test_tiles_give_the_gradients_of_the_reference_back_end(folders: dict[str, Path], kind: str, lora: bool, tokens: int) -> None:
    backend = Reference(CPU, FP32)
    expected = loss_and_gradients(model_of(folders[kind], lora=lora), backend)
    model = model_of(folders[kind], lora=lora, recompute=True)
    assert tile_blocks(model, tokens=tokens) == 2
    assert_equal(loss_and_gradients(model, backend), expected)


@pytest.mark.parametrize("tokens", [5, 62])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", FUSED)
def test_tiles_give_the_gradients_of_compiled_layers(
    folders: dict[str, Path], kernels: Kernels, kind: str, lora: bool, tokens: int
) -> None:
    backend = CpuBackend(FP32, kernels=kernels)
    expected = loss_and_gradients(model_of(folders[kind], lora=lora), CpuBackend(FP32))
    model = model_of(folders[kind], lora=lora, recompute=True)
    assert fuse(model, backend, kernels=kernels) == 11
    assert tile_blocks(model, tokens=tokens) == 2
    assert_equal(loss_and_gradients(model, backend), expected)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_tiles_run_under_autocast_as_the_whole_block_does(folders: dict[str, Path], kernels: Kernels, fused: bool) -> None:
    backend = CpuBackend(MIXED, kernels=kernels if fused else None)
    whole, tiled = (model_of(folders["llama"], lora=False, recompute=True) for _ in range(2))
    for model in (whole, tiled):
        assert not fused or fuse(model, backend, kernels=kernels) == 11
    assert tile_blocks(tiled, tokens=16) == 2
    for one, other in zip(loss_and_gradients(tiled, backend), loss_and_gradients(whole, backend), strict=True):
        assert one.dtype == other.dtype and (one - other).norm() <= 0.02 * other.norm()


class Counted(CpuBackend):
    """Counts its attention."""

    attended = 0

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        self.attended += 1
        return super().attend(q_THE, k_TKE, v_TKE, documents, scoring)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_each_layer_is_computed_twice_and_each_tile_of_its_block_too(folders: dict[str, Path], kernels: Kernels, fused: bool) -> None:
    model, backend = model_of(folders["llama"], lora=True, recompute=True), Counted(FP32)
    if fused:
        fuse(model, backend, kernels=kernels)
    rows: list[int] = []
    for layer in decoder_layers(model):
        layer.mlp.forward = counting(layer.mlp.forward, rows)
    tile_blocks(model, tokens=16)
    rows.clear()
    backend.attended = 0
    loss_and_gradients(model, backend)
    assert backend.attended == 2 * 2, "the backward pass computes the attention of both layers again"
    assert sorted(rows) == sorted(2 * 2 * [16, 16, 16, 15]), "once in the forward and once in the backward pass"


def counting(forward: object, rows: list[int]) -> object:
    def counted(x: Tensor, **options: object) -> Tensor:
        rows.append(x.shape[1])
        return forward(x, **options)  # type: ignore[operator]

    return counted


@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe"])
def test_experts_stay_whole(kind: str) -> None:
    assert tile_blocks(plain_model(kind), tokens=16) == 0


def test_a_block_with_dropout_or_a_view_of_other_tokens_stays_whole() -> None:
    assert tile_blocks(plain_model("gpt2", resid_pdrop=0.1), tokens=16) == 0
    model = plain_model("llama")
    first, second = decoder_layers(model)
    first.mlp = Averaging(first.mlp)
    assert tile_blocks(model, tokens=16) == 1 and "forward" not in vars(first.mlp) and "forward" in vars(second.mlp)


class Averaging(nn.Module):
    """A block whose tokens see the mean of all."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x - x.mean(1, keepdim=True))
