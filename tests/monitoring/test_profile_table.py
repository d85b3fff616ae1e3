"""Whose time it is, where no GPU is at hand: events as torch.profiler gives them for a step whose work an accelerator does."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from llamahome.monitoring.profile_table import Measured, measure, table


@dataclass(eq=False)
class Event:
    """The fields of torch.autograd.profiler_util.FunctionEvent that the table is made from."""

    name: str
    cpu_parent: "Event | None" = None
    self_cpu_time_total: float = 0.0
    self_device_time_total: float = 0.0
    sequence_nr: int = -1
    fwd_thread: int = 0
    thread: int = 1
    scope: int = 0
    is_async: bool = False
    input_shapes: list[list[int]] = field(default_factory=list)
    start: float = 0.0
    length: float = 1e6
    cpu_children: list["Event"] = field(default_factory=list)
    device: str = "CPU"

    def __post_init__(self) -> None:
        if self.cpu_parent is not None:
            self.cpu_parent.cpu_children.append(self)

    @property
    def device_type(self) -> Any:
        return SimpleNamespace(name=self.device)

    @property
    def time_range(self) -> Any:
        return SimpleNamespace(start=self.start, elapsed_us=lambda: self.length)


def step_on_an_accelerator() -> list[Event]:
    """A product of an MLP and one of an adapter in it; the engine's thread (2) works for the main thread (1), which waits."""
    step = Event("step 7")
    forward = Event("part: forward", step)
    decoder = Event("layer: rest of the model", forward)
    mlp = Event("layer: MLP", decoder)
    product = Event("aten::mm", mlp, 10, 4e5, sequence_nr=3, input_shapes=[[64, 32], [32, 48]])
    low = Event("aten::mm", mlp, 10, 1e5, sequence_nr=4, input_shapes=[[64, 32], [32, 8]])
    loss = Event("aten::nll", forward, 10, 5e4, sequence_nr=5)
    backward = Event("part: backward", step, self_cpu_time_total=9e5)
    node = Event("autograd::engine::evaluate_function: MmBackward0", None, 5, thread=2, sequence_nr=3, fwd_thread=1)
    behind = Event("aten::mm", node, 10, 3e5, thread=2, input_shapes=[[64, 48], [48, 32]])
    update = Event("part: update", step)
    adam = Event("aten::_fused_adamw_", update, 10, 2e4)
    beside = Event("aten::copy_", None, 10, 7e5, thread=3)
    kernel = Event("gemm", None, 0, 4e5, device="CUDA")
    return [step, forward, decoder, mlp, product, low, loss, backward, node, behind, update, adam, beside, kernel]


def test_the_time_of_the_accelerator_counts_and_that_of_other_threads_does_not() -> None:
    measured = measure(step_on_an_accelerator(), {8})
    assert measured.on_device and measured.steps == 1 and measured.seconds_per_step == 1.0
    assert {kind: seconds for kind, seconds in measured.forward.items() if seconds} == pytest.approx(
        {"MLP": 0.4, "LoRA": 0.1, "head and loss": 0.05, "optimizer": 0.02}
    )
    assert {kind: seconds for kind, seconds in measured.backward.items() if seconds} == pytest.approx({"MLP": 0.3})
    assert "time of the accelerator, ms a step" in table(measured, 7, 7)


def test_without_an_adapter_no_product_is_one_of_lora() -> None:
    assert "LoRA" not in measure(step_on_an_accelerator(), set()).forward


def test_a_step_without_a_pass_does_not_count() -> None:
    empty = Event("step 8", length=5.0)
    measured = measure([*step_on_an_accelerator(), empty, Event("part: data", empty)], set())
    assert measured.steps == 1 and measured.wall == 1.0


def test_nothing_profiled_gives_no_table() -> None:
    assert table(Measured(0, 0.0, {}, {}, [], on_device=False), 1, 2) == ["no step was profiled"]
