"""A whole step of the CUDA back end on a device without values, where whatever reads one raises: nothing waits for the GPU.

From the loader's pass to the update, with the kernels that a GPU would run: varlen_attn in bfloat16 among them.
"""

import itertools
import sys
from typing import Any, Literal

import pytest
import torch
from tests.support.models import VOCABULARY, examples_of, tiny_config
from tests.support.runs import table_of
from transformers import LlamaConfig, PreTrainedConfig

from llamahome.config.schema import LoraConfig
from llamahome.data.steps.loader import Loader
from llamahome.data.steps.mixture import plain_order
from llamahome.distributed.exchange import FlatExchange
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
from llamahome.training.optimizer import make_optimizer
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
    """torch has shapes for the fused update of a device without values, but does not list it."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])


def step_on_meta(model: CausalLM, precision: Precision, *, lengths: list[int]) -> tuple[StepResult, dict[str, Any]]:
    """One update over the loader's first step; returns it and the gradients as the optimizer saw them."""
    backend, world = backend_of("cuda", META, precision), World(0, 1, 0, META)
    parameters = trained_parameters(model)
    optimizer = make_optimizer("adamw", parameters, weight_decay=0.01)
    seen: dict[str, Any] = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update({name: each.grad for name, each in parameters.items()}))
    table = table_of(examples_of(lengths))
    settings: dict[str, Any] = {"batch_size": len(lengths), "micro_batch_tokens": sum(lengths) // 2, "seed": 0}
    with Loader(table, plain_order(table.num_rows), total_positions=len(lengths), deliver=backend.deliver, **settings) as loader:
        microbatches = next(loader)
    assert len(microbatches) > 1 and all(each.tokens_T.is_meta and each.labels_N.is_meta for each in microbatches)
    result = train_step(
        Objective(model, backend).loss_sum,
        optimizer,
        microbatches,
        num_targets=sum(each.num_targets for each in microbatches),
        seeds=[0] * len(microbatches),
        max_grad_norm=1.0,
        exchange=FlatExchange(world, list(parameters.values())),
        clock=PartClock(),
    )
    assert isinstance(result, StepResult)
    return result, seen


@pytest.mark.parametrize("precision", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("kind", "method"), [*itertools.product(("llama", "gemma2", "gemma3"), ("lora", "full")), ("mixtral", "full")])
def test_a_step_reads_nothing_back(kind: str, method: Method, precision: Precision) -> None:
    if kind == "mixtral" and precision is FP32:
        pytest.skip("torch's products of experts have shapes for bfloat16 alone")
    model = model_of(tiny_config(kind), method, precision)
    result, gradients = step_on_meta(model, precision, lengths=[9, 250, 14, 3, 300, 7])
    assert all(value.is_meta and value.shape == () for value in vars(result).values())
    assert result.loss.dtype == torch.float32
    trained = trained_parameters(model)
    assert gradients.keys() == trained.keys()
    for name, gradient in gradients.items():
        assert (gradient.shape, gradient.dtype, gradient.device) == (trained[name].shape, trained[name].dtype, META), name
    if method == "lora":
        assert all(each.dtype == torch.float32 for each in trained.values())


def test_a_step_of_eight_billion_weights_reads_nothing_back() -> None:
    model = model_of(LlamaConfig(**LLAMA_8B), "lora", BF16)
    result, gradients = step_on_meta(model, BF16, lengths=[2000 % VOCABULARY, 5000, 3000, 1500])
    assert result.loss.is_meta and len(gradients) == 2 * 7 * 32


def test_the_device_without_values_sees_what_waits() -> None:
    for read in (lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.cpu()):
        with pytest.raises(RuntimeError):
            read(torch.zeros((), device=META))
