"""A fused model has the same loss and gradients as the code of transformers and PEFT."""

import functools
from pathlib import Path

import pytest
import torch
from tests.support.levels import kernels_or_skip
from tests.support.models import FP32, KINDS, examples_of, microbatch_of, our_model, save_tiny
from torch import nn

from llamahome.config.schema import LoraConfig
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.backends.cpu.fuse import fuse, unfuse
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import trained_parameters
from llamahome.model.precision import Precision
from llamahome.training.optimizer import make_optimizer, set_learning_rate

MIXED = Precision(torch.float32, torch.bfloat16, "a test")
PARTS = {
    "llama": 11,
    "llama-mha": 11,
    "qwen2": 11,
    "qwen3": 13,
    "mistral": 11,
    "gemma": 11,
    "phi3": 5,
    "gemma2": 11,
    "granite": 9,
    "phi": 0,
    "gpt2": 0,
}
"""Number of replaced parts: five norms, two gated blocks, two attentions, and two layers that recompute norms. Not replaced are the
attention of Qwen 3, which has norms of its own, that of Phi 3 and Gemma 2, and the layers of Granite, which have another form."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return kernels_or_skip()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in KINDS}


def model_of(folder: Path, *, lora: bool, **changes) -> nn.Module:
    model = our_model(folder)
    if lora:
        add_lora(model, LoraConfig(**{"rank": 4, "alpha": 6, **changes}), base="tiny", seed=1, lean=True)
        random = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "vera_lambda_b" in name:  # initially zero, which makes half of the gradients vanish
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return model.train()


def loss_and_gradients(model: nn.Module, precision: Precision, lengths: tuple[int, ...] = (33, 20, 9, 2)) -> list[torch.Tensor]:
    model.zero_grad()
    loss = Objective(model, CpuBackend(precision)).loss_sum(microbatch_of(examples_of(lengths)))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in trained_parameters(model).values() if parameter.grad is not None)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * (other.norm() + 1e-6)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_the_unfused_model(folders: dict[str, Path], kernels: Kernels, kind: str, lora: bool) -> None:
    if lora and kind == "deepseek":
        pytest.skip("PEFT warns that its experts are not linear layers")
    model = model_of(folders[kind], lora=lora)
    expected = loss_and_gradients(model, FP32)
    parts = fuse(model, CpuBackend(FP32, kernels=kernels), kernels=kernels)
    if kind in PARTS:
        assert parts == PARTS[kind]
    assert_close(loss_and_gradients(model, FP32), expected, 1e-5)


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return float(sum((one - other).square().sum() for one, other in zip(found, exact, strict=True)).sqrt())


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "qwen2", "gemma"])
def test_full_training_under_autocast_is_as_close_to_float32_as_before_and_uses_updated_weights(
    folders: dict[str, Path], kernels: Kernels, kind: str
) -> None:
    model = model_of(folders[kind], lora=False)
    fused = model_of(folders[kind], lora=False)
    assert fuse(fused, CpuBackend(MIXED, kernels=kernels), kernels=kernels) == 11
    optimizer = make_optimizer("adamw", dict(fused.named_parameters()), weight_decay=0.0)
    set_learning_rate(optimizer, 0.02)
    for _ in range(3):
        exact, plain, found = loss_and_gradients(model, FP32), loss_and_gradients(model, MIXED), loss_and_gradients(fused, MIXED)
        assert distance(found, exact) <= 1.5 * distance(plain, exact)
        optimizer.step()
        model.load_state_dict(fused.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "v_proj"},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_vera": True},
        {"target_modules": ["q_proj", "v_proj", "gate_proj"], "use_vera": True},
        {"target_modules": ["k_proj", "up_proj"], "use_dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_of_all_kinds_are_applied(folders: dict[str, Path], kernels: Kernels, kind: str, changes: dict) -> None:
    model = model_of(folders[kind], lora=True, **changes)
    expected = loss_and_gradients(model, FP32)
    assert fuse(model, CpuBackend(FP32, kernels=kernels), kernels=kernels) == 11
    assert_close(loss_and_gradients(model, FP32), expected, 2e-5)


def test_a_disabled_or_merged_adapter_runs_the_code_of_peft(folders: dict[str, Path], kernels: Kernels) -> None:
    model = our_model(folders["llama"])
    adapted = add_lora(model, LoraConfig(rank=4), base="tiny", seed=1, lean=True)
    measure = functools.partial(Objective(model, CpuBackend(FP32)).loss_sum, microbatch_of(examples_of((20, 9))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        learned = measure()
        fuse(model, CpuBackend(FP32, kernels=kernels), kernels=kernels)
        torch.testing.assert_close(measure(), learned)
        with adapted.disable_adapter():
            bare = measure()
        assert not torch.isclose(bare, learned)
        adapted.merge_adapter()
        torch.testing.assert_close(measure(), learned)
        adapted.unmerge_adapter()
        torch.testing.assert_close(measure(), learned)


def test_weights_keep_names_and_values_and_are_not_stored_twice(folders: dict[str, Path], kernels: Kernels) -> None:
    model = model_of(folders["llama"], lora=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model, CpuBackend(FP32, kernels=kernels), kernels=kernels)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    layer = model.get_decoder().layers[0]
    weights = [getattr(layer.mlp, name).base_layer.weight for name in ("gate_proj", "up_proj")]
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in weights}
    assert sum(held.values()) == sum(each.nbytes for each in weights)


def test_a_model_whose_output_changes_is_restored(folders: dict[str, Path], kernels: Kernels) -> None:
    model = model_of(folders["llama"], lora=True)
    expected = loss_and_gradients(model, FP32)
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda module, args, out: out * (1 if "forward" not in vars(module) else 2))
    assert fuse(model, CpuBackend(FP32, kernels=kernels), kernels=kernels) == 0
    assert_close(loss_and_gradients(model, FP32), expected, 0.0)
    assert not any("forward" in vars(module) for module in model.modules())


def test_unfuse_restores_every_forward(folders: dict[str, Path], kernels: Kernels) -> None:
    model = model_of(folders["llama"], lora=True)
    expected = loss_and_gradients(model, FP32)
    assert fuse(model, CpuBackend(FP32, kernels=kernels), kernels=kernels) == 11
    unfuse(model)
    assert_close(loss_and_gradients(model, FP32), expected, 0.0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_recomputing_in_the_backward_pass_gives_the_same_gradients(folders: dict[str, Path], kernels: Kernels) -> None:
    model = model_of(folders["llama"], lora=True)
    fuse(model, CpuBackend(FP32, kernels=kernels), kernels=kernels)
    expected = loss_and_gradients(model, FP32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(loss_and_gradients(model, FP32), expected, 0.0)
