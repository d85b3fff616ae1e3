"""Every back end passes the same battery: it computes what the reference does, for each document alone, whatever lies beside it."""

from pathlib import Path

import pytest
import torch
from tests.support.levels import HERE
from tests.support.models import CPU, DEVICE_KINDS, FP32, examples_of, microbatch_of, our_model, save_tiny
from tests.support.varlen import stand_in
from torch import Tensor

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Microbatch
from llamahome.data.steps.loader import idle_microbatch
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import backend_of
from llamahome.model.load import CausalLM
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective

BACKENDS = ("cpu", *(f"cpu {level}" for level in HERE), "cuda", "cuda compiled")
LENGTHS = (40, 17, 23, 2, 9, 1)


def made(name: str, model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The back end of this name, ready for `model`; that of a GPU computes on a processor too, with a stand-in for its attention."""
    kind, _, how = name.partition(" ")
    if kind == "cpu" and model.device != CPU:
        pytest.skip("it computes on processors")
    backend = backend_of(kind, model.device, FP32)
    if kind == "cuda" and model.device == CPU:
        stand_in(monkeypatch)
    if kind == "cpu" and how:
        monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", how)
    if how:
        if reason := backend.cannot_compile():
            pytest.skip(reason)
        assert backend.compile(model) > 0
    return backend


def model_of(folder: Path, device: torch.device, *, lora: bool) -> CausalLM:
    model = our_model(folder)
    if lora:
        add_lora(model, LoraConfig(rank=4), base="tiny", seed=1, lean=True)
        random = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first, where half of the gradients vanish
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return model.to(device).train()


def learned(model: CausalLM, backend: Backend, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """Summed loss and every gradient in one row."""
    model.zero_grad()
    loss = Objective(model, backend).loss_sum(backend.deliver(batch))
    loss.backward()
    return loss.detach().cpu(), torch.cat([each.grad.flatten().cpu() for each in model.parameters() if each.grad is not None])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in DEVICE_KINDS}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", DEVICE_KINDS)
@pytest.mark.parametrize("name", BACKENDS)
def test_loss_and_gradients_are_those_of_the_reference(
    folders: dict[str, Path], name: str, kind: str, lora: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lora and kind == "mixtral":
        pytest.skip("its experts are no linear layers, of which PEFT warns")
    batch = microbatch_of(examples_of(LENGTHS))
    wanted = learned(model_of(folders[kind], device, lora=lora), backend_of("reference", device, FP32), batch)
    model = model_of(folders[kind], device, lora=lora)
    found = learned(model, made(name, model, monkeypatch), batch)
    assert abs(found[0] - wanted[0]) <= 1e-5 * wanted[0]
    assert (found[1] - wanted[1]).norm() <= 2e-5 * wanted[1].norm()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_pass_is_the_sum_of_its_documents(
    folders: dict[str, Path], name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = model_of(folders["llama"], device, lora=False), examples_of(LENGTHS)
    backend = made(name, model, monkeypatch)
    whole = learned(model, backend, microbatch_of(examples))
    apart = [learned(model, backend, microbatch_of([example])) for example in examples[:-1]]  # the last has no target
    assert abs(whole[0] - sum(loss for loss, _ in apart)) <= 1e-5 * whole[0]
    assert (whole[1] - sum(gradients for _, gradients in apart)).norm() <= 2e-5 * whole[1].norm()


@pytest.mark.parametrize("name", BACKENDS)
def test_statistics_are_those_of_the_reference(
    folders: dict[str, Path], name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = our_model(folders["llama"]).to(device), microbatch_of(examples_of(LENGTHS))
    reference = backend_of("reference", device, FP32)
    wanted = Objective(model, reference).stats(reference.deliver(batch))
    backend = made(name, model, monkeypatch)
    found = Objective(model, backend).stats(backend.deliver(batch))
    torch.testing.assert_close(found.loss_sum, wanted.loss_sum, rtol=1e-5, atol=0)
    assert found.correct == wanted.correct


@pytest.mark.parametrize("name", BACKENDS)
def test_a_pass_without_targets_learns_nothing(
    folders: dict[str, Path], name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(folders["llama"], device, lora=False)
    backend = made(name, model, monkeypatch)
    loss, gradients = learned(model, backend, idle_microbatch(index=0))
    assert loss == 0 and not gradients.any()
