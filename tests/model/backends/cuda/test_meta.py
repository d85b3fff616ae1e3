"""A complete step of the CUDA back end on the meta device, where reading a value raises an error: nothing waits for the GPU.

The step runs from the loader's pass to the update, with the kernels of a GPU, varlen_attn in bfloat16 among them.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tests.support.models import VOCABULARY, examples_of, tiny_config
from tests.support.runs import table_of
from transformers import LlamaConfig, PreTrainedConfig

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Microbatch
from llamahome.data.steps.loader import Deliver, Loader
from llamahome.data.steps.mixture import plain_order
from llamahome.data.steps.taught_steps import IDS, LOGS, REST
from llamahome.distributed.reducer import FlatReducer
from llamahome.distributed.world import World
from llamahome.model.attention import ATTENTION_NAME, register_attention
from llamahome.model.backends.choose import backend_of
from llamahome.model.load import CausalLM
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import trained_parameters
from llamahome.model.precision import Precision
from llamahome.model.skeleton import skeleton
from llamahome.monitoring.throughput import PartClock
from llamahome.training.distillation import DistillationObjective
from llamahome.training.objective import TrainingObjective
from llamahome.training.optimizer import make_optimizer
from llamahome.training.policy import MEASURED, PolicyObjective
from llamahome.training.spikes import Limits, Spikes
from llamahome.training.step import StepResult, train_step

META = torch.device("meta")
BF16 = Precision(torch.bfloat16, torch.bfloat16, "a test")
FP32 = Precision(torch.float32, torch.float32, "a test")
Method = Literal["lora", "full"]
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}


def model_of(config: PreTrainedConfig, method: Method, precision: Precision) -> CausalLM:
    register_attention()
    model = skeleton(config, layers=config.num_hidden_layers, dtype=precision.storage)
    model.set_attn_implementation(ATTENTION_NAME)
    if method == "lora":
        add_lora(model, LoraConfig(rank=16), base="meta", seed=0, lean=True)
    return model.train()


@pytest.fixture(autouse=True)
def _fused_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch supports the fused update on the meta device, but does not list it."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])


def as_it_is(batch: Microbatch) -> Microbatch:
    return batch


def step_on_meta(
    model: CausalLM,
    precision: Precision,
    *,
    lengths: list[int],
    learns: Callable[[Objective], TrainingObjective] = lambda supervised: supervised,
    beside: Deliver = as_it_is,
) -> tuple[StepResult, dict[str, Any]]:
    """One update over the loader's first step; returns its result and the gradients that the optimizer received.

    `beside` adds what the objective needs to a micro-batch before it goes to the device.
    """
    backend, world = backend_of("cuda", META, precision), World(0, 1, 0, META)
    learned = learns(Objective(model, backend))
    parameters = trained_parameters(model)
    optimizer = make_optimizer("adamw", parameters, weight_decay=0.01)
    gradients: dict[str, Any] = {}
    optimizer.register_step_pre_hook(lambda *_: gradients.update({name: tensor.grad for name, tensor in parameters.items()}))
    table = table_of(examples_of(lengths))
    settings: dict[str, Any] = {"batch_size": len(lengths), "micro_batch_tokens": sum(lengths) // 2, "seed": 0}
    with Loader(
        table, plain_order(table.num_rows), total_positions=len(lengths), deliver=lambda batch: backend.to_device(beside(batch)), **settings
    ) as loader:
        microbatches = next(loader).microbatches
    assert len(microbatches) > 1 and all(tensor.tokens_T.is_meta and tensor.labels_N.is_meta for tensor in microbatches)
    result = train_step(
        learned.loss_sum,
        optimizer,
        microbatches,
        divisors=[sum(each) for each in zip(*map(learned.units, microbatches), strict=True)],
        seed=0,
        limits=Limits(1.0, Spikes(torch.device("meta"))),
        reducer=FlatReducer(world, list(parameters.values())),
        clock=PartClock(),
    )
    assert isinstance(result, StepResult)
    return result, gradients


@pytest.mark.parametrize("precision", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("kind", "method"), [*itertools.product(("llama", "gemma2", "gemma3"), ("lora", "full")), ("mixtral", "full")])
def test_a_step_reads_no_value(kind: str, method: Method, precision: Precision) -> None:
    if kind == "mixtral" and precision is FP32:
        pytest.skip("torch's products of experts support the meta device only in bfloat16")
    model = model_of(tiny_config(kind), method, precision)
    result, gradients = step_on_meta(model, precision, lengths=[9, 250, 14, 3, 300, 7])
    assert all(value.is_meta and value.shape == () for value in (result.loss, result.grad_norm, result.refused)) and result.short is None
    assert result.loss.dtype == torch.float32
    trained = trained_parameters(model)
    assert gradients.keys() == trained.keys()
    for name, gradient in gradients.items():
        assert (gradient.shape, gradient.dtype, gradient.device) == (trained[name].shape, trained[name].dtype, META), name
    if method == "lora":
        assert all(tensor.dtype == torch.float32 for tensor in trained.values())


def taught(batch: Microbatch) -> Microbatch:
    count = batch.num_targets
    return replace(batch, extra={IDS: torch.zeros(count, 4, dtype=torch.int64), LOGS: torch.zeros(count, 4), REST: torch.zeros(count)})


def answered(batch: Microbatch) -> Microbatch:
    figures = torch.zeros(len(batch.lengths), len(MEASURED))
    return replace(batch, extra={"advantages": torch.ones(batch.num_targets), "answers": figures})


@pytest.mark.parametrize(
    ("learns", "beside"),
    [
        (lambda supervised: DistillationObjective(supervised, 0.5, 2.0), taught),
        (lambda supervised: PolicyObjective(supervised, 0.9, 0.1), answered),
    ],
    ids=["distill", "grpo"],
)
def test_a_step_of_other_objectives_reads_no_value(learns: Callable[[Objective], TrainingObjective], beside: Deliver) -> None:
    model = model_of(tiny_config("llama"), "lora", BF16)
    result, gradients = step_on_meta(model, BF16, lengths=[9, 250, 14, 3, 300, 7], learns=learns, beside=beside)
    assert result.loss.is_meta and result.measured.is_meta
    assert len(result.measured) == len(learns(Objective(model, backend_of("cuda", META, BF16))).measured)
    assert gradients.keys() == trained_parameters(model).keys()


@pytest.mark.medium
def test_a_step_of_eight_billion_weights_reads_no_value() -> None:
    model = model_of(LlamaConfig(**LLAMA_8B), "lora", BF16)
    result, gradients = step_on_meta(model, BF16, lengths=[2000 % VOCABULARY, 5000, 3000, 1500])
    assert result.loss.is_meta and len(gradients) == 2 * 7 * 32


def test_reading_a_value_on_the_meta_device_raises() -> None:
    for read in (lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.cpu()):
        with pytest.raises(RuntimeError):
            read(torch.zeros((), device=META))
