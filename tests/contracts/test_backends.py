"""Every back end passes the same tests: it equals the reference, and a document does not depend on the others of its pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.levels import SUPPORTED_LEVELS
from tests.support.models import CPU, DEVICE_KINDS, FP32, VOCABULARY, examples_of, microbatch_of, our_model, save_tiny
from tests.support.varlen import use_plain_varlen
from torch import Tensor

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Microbatch
from llamahome.data.steps.loader import idle_microbatch
from llamahome.data.steps.taught_steps import IDS, LOGS, REST
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import backend_of
from llamahome.model.load import CausalLM
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.training.distillation import DistillationObjective
from llamahome.training.policy import MEASURED, PolicyObjective

BACKENDS = ("cpu", *(f"cpu {level}" for level in SUPPORTED_LEVELS), "cuda", "cuda compiled")
LENGTHS = (40, 17, 23, 2, 9, 1)


def prepared(name: str, model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The back end of this name, ready for `model`; that of a GPU computes on a processor too, with a stand-in for its attention."""
    kind, _, option = name.partition(" ")
    if kind == "cpu" and model.device != CPU:
        pytest.skip("this back end runs on processors")
    backend = backend_of(kind, model.device, FP32)
    if kind == "cuda" and model.device == CPU:
        use_plain_varlen(monkeypatch)
    if kind == "cpu" and option:
        monkeypatch.setenv("LLAMAHOME_CPU_LEVEL", option)
    if option:
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
            if "lora_B" in name:  # initially zero, which makes half of the gradients vanish
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return model.to(device).train()


def loss_and_gradients(model: CausalLM, backend: Backend, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """Summed loss and all gradients in one vector."""
    model.zero_grad()
    loss = Objective(model, backend).loss_sum(backend.to_device(batch))
    loss.backward()
    return loss.detach().cpu(), torch.cat(
        [parameter.grad.flatten().cpu() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(root / kind, kind) for kind in DEVICE_KINDS}


CASES = [(name, kind, lora) for name in BACKENDS for kind in DEVICE_KINDS for lora in (True, False)]
SLOW = [case for case in CASES if case[0] == "cuda compiled" and case != ("cuda compiled", "llama", True)]


@pytest.mark.parametrize(
    ("name", "kind", "lora"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SLOW else [], id=f"{case[0]}-{case[1]}-{'lora' if case[2] else 'full'}")
        for case in CASES
    ],
)
def test_loss_and_gradients_equal_the_reference(
    folders: dict[str, Path], name: str, kind: str, lora: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lora and kind == "mixtral":
        pytest.skip("PEFT warns that its experts are not linear layers")
    batch = microbatch_of(examples_of(LENGTHS))
    expected = loss_and_gradients(model_of(folders[kind], device, lora=lora), backend_of("reference", device, FP32), batch)
    model = model_of(folders[kind], device, lora=lora)
    result = loss_and_gradients(model, prepared(name, model, monkeypatch), batch)
    assert abs(result[0] - expected[0]) <= 1e-5 * expected[0]
    assert (result[1] - expected[1]).norm() <= 2e-5 * expected[1].norm()


def with_extra(batch: Microbatch) -> Microbatch:
    """With what a teacher says and with the figures of answers."""
    random, count = torch.Generator().manual_seed(6), batch.num_targets
    logs = torch.randn(count, 9, generator=random).log_softmax(-1)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=random)[:8] for _ in range(count)])
    taught = {IDS: ids, LOGS: logs[:, :8], REST: logs[:, 8]}
    answers = torch.rand(len(batch.lengths), len(MEASURED), generator=random)
    return replace(batch, extra={**taught, "advantages": torch.randn(count, generator=random), "answers": answers})


@pytest.mark.parametrize("objective", ["distill", "grpo"])
@pytest.mark.parametrize("name", [*BACKENDS[:-1], pytest.param(BACKENDS[-1], marks=pytest.mark.slow)])
def test_other_objectives_equal_the_reference(
    folders: dict[str, Path], name: str, objective: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(wanted: str) -> tuple[Tensor, Tensor]:
        model = model_of(folders["llama"], device, lora=True)
        backend = prepared(wanted, model, monkeypatch) if wanted != "reference" else backend_of(wanted, device, FP32)
        supervised = Objective(model, backend)
        learned = DistillationObjective(supervised, 0.4, 1.5) if objective == "distill" else PolicyObjective(supervised, 0.8, 0.3)
        sums = learned.loss_sum(backend.to_device(with_extra(microbatch_of(examples_of(LENGTHS)))))
        sums[0].backward()
        return sums.detach().cpu(), torch.cat([each.grad.flatten().cpu() for each in model.parameters() if each.grad is not None])

    (sums, gradient), (expected_sums, expected_gradient) = found(name), found("reference")
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-4)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_pass_is_the_sum_of_its_documents(
    folders: dict[str, Path], name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = model_of(folders["llama"], device, lora=False), examples_of(LENGTHS)
    backend = prepared(name, model, monkeypatch)
    whole = loss_and_gradients(model, backend, microbatch_of(examples))
    separate = [loss_and_gradients(model, backend, microbatch_of([example])) for example in examples[:-1]]  # the last has no target
    assert abs(whole[0] - sum(loss for loss, _ in separate)) <= 1e-5 * whole[0]
    assert (whole[1] - sum(gradients for _, gradients in separate)).norm() <= 2e-5 * whole[1].norm()


@pytest.mark.parametrize("name", BACKENDS)
def test_statistics_equal_the_reference(folders: dict[str, Path], name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = our_model(folders["llama"]).to(device), microbatch_of(examples_of(LENGTHS))
    reference = backend_of("reference", device, FP32)
    expected = Objective(model, reference).stats(reference.to_device(batch))
    backend = prepared(name, model, monkeypatch)
    result = Objective(model, backend).stats(backend.to_device(batch))
    torch.testing.assert_close(result.loss_sum, expected.loss_sum, rtol=1e-5, atol=0)
    assert result.correct == expected.correct


@pytest.mark.parametrize("name", BACKENDS)
def test_a_pass_without_targets_has_no_gradients(
    folders: dict[str, Path], name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(folders["llama"], device, lora=False)
    backend = prepared(name, model, monkeypatch)
    loss, gradients = loss_and_gradients(model, backend, idle_microbatch(index=0))
    assert loss == 0 and not gradients.any()
