"""The CUDA back end with compiled layers, run on a processor, has the loss and gradients that transformers has for each document."""

from pathlib import Path

import pytest
import torch
from tests.support.models import CPU, DEVICE_KINDS, FP32, examples_of, microbatch_of, our_model, plain_loss, plain_model, save_tiny
from tests.support.varlen import use_plain_varlen
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import backend_of
from llamahome.model.load import CausalLM
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import place
from llamahome.model.precision import Precision

EXAMPLES = examples_of([9, 25, 14, 3, 30, 7])
CASES = [
    *((kind, "aot_eager") for kind in DEVICE_KINDS),
    *(pytest.param(kind, "inductor", marks=[] if kind == "llama" else pytest.mark.slow) for kind in DEVICE_KINDS),
]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def graphs() -> int:
    """Number of graphs that were compiled since the last reset."""
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def loss_of(model: CausalLM, backend: Backend) -> Tensor:
    """Loss of the examples in one pass; its gradients stay in the model."""
    loss = Objective(model, backend).loss_sum(backend.to_device(microbatch_of(EXAMPLES)))
    loss.backward()
    return loss.detach()


def assert_equals_transformers(model: CausalLM, loss: Tensor, kind: str) -> None:
    plain = plain_model(kind).train()
    expected = sum(plain_loss(plain, example) for example in EXAMPLES)
    assert isinstance(expected, Tensor)
    expected.backward()
    assert abs(loss - expected.detach()) <= 1e-5 * expected.detach()
    assert torch.cosine_similarity(gradients(model), gradients(plain), 0) > 0.9999


@pytest.mark.medium
@pytest.mark.parametrize(("kind", "compiler"), CASES)
def test_compiled_layers_have_the_gradients_of_transformers(
    kind: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_plain_varlen(monkeypatch, compiler=compiler)
    model, backend = our_model(save_tiny(tmp_path / kind, kind)).train(), backend_of("cuda", CPU, FP32)
    assert backend.performance_notes(model) == []
    assert backend.compile(model) == 3
    assert_equals_transformers(model, loss_of(model, backend), kind)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert graphs() == (6 if kind == "gemma3" else 5), "four for all layers, one for another window, one for the loss"


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2", "deepseek"])
def test_attention_that_varlen_does_not_support_is_masked(kind: str, tmp_path: Path) -> None:
    model, backend = our_model(save_tiny(tmp_path / kind, kind)).train(), backend_of("cuda", CPU, FP32)
    (note,) = backend.performance_notes(model)
    assert note.startswith("attention: ")
    assert_equals_transformers(model, loss_of(model, backend), kind)


def test_layers_are_compiled_inside_of_activation_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_varlen(monkeypatch)
    model, backend = our_model(save_tiny(tmp_path / "llama")), backend_of("cuda", CPU, FP32)
    place(model, world=World(0, 1, 0, CPU), checkpointing=True, sync_batch_norm=False)
    backend.compile(model)
    assert_equals_transformers(model, loss_of(model, backend), "llama")
    assert graphs() == 5


@pytest.mark.medium
def test_adapters_have_the_same_gradients_in_compiled_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_varlen(monkeypatch)
    results = []
    for compiled in (False, True):
        model, backend = our_model(save_tiny(tmp_path / "llama", num_hidden_layers=3)), backend_of("cuda", CPU, FP32)
        add_lora(model, LoraConfig(rank=4), base="llama", seed=0, lean=True)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # initially zero, which makes the gradient of A zero
                torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
        model.train()
        if compiled:
            backend.compile(model)
        results.append((loss_of(model, backend), gradients(model)))
    (plain, grad_plain), (compiled_loss, grad) = results
    assert graphs() == 8, "four for the first layer, whose input needs no gradient, three others for the rest, one for the tile"
    assert abs(compiled_loss - plain) <= 1e-5 * plain
    assert torch.cosine_similarity(grad, grad_plain, 0) > 0.9999


def test_full_fine_tuning_in_bfloat16_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_plain_varlen(monkeypatch)
    results, mixed = [], Precision(torch.float32, torch.bfloat16, "a test")
    for compiled in (False, True):
        model, backend = our_model(save_tiny(tmp_path / "llama")).train(), backend_of("cuda", CPU, mixed)
        if compiled:
            backend.compile(model)
        results.append((loss_of(model, backend), gradients(model)))
    (plain, grad_plain), (loss, grad) = results
    assert [record for record in caplog.records if record.levelname == "ERROR"] == [] and graphs() >= 5
    assert abs(loss - plain) <= 1e-3 * plain and grad.dtype == torch.float32
    assert torch.cosine_similarity(grad, grad_plain, 0) > 0.999


def broken(graph: object, inputs: object) -> None:
    raise RuntimeError("no compiler in sight")


HALF_BROKEN = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=broken)


@pytest.mark.parametrize("compiler", [broken, HALF_BROKEN], ids=["both directions", "backward"])
def test_a_failing_compiler_is_logged_and_the_step_continues(
    compiler: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_plain_varlen(monkeypatch)
    model, backend = our_model(save_tiny(tmp_path / "llama")).train(), backend_of("cuda", CPU, FP32)
    monkeypatch.setattr("llamahome.model.backends.cuda.layers.COMPILER", compiler)
    assert compiler is HALF_BROKEN or "no compiler in sight" in str(backend.cannot_compile())
    backend.compile(model)
    assert_equals_transformers(model, loss_of(model, backend), "llama")
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "no compiler in sight" in record.getMessage()
