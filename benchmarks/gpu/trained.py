"""Trains a model with random weights with llamahome's adapters, back end, optimizer and step."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.gpu.shapes import Shape, random_model
from llamahome.config.schema import Config, LoraConfig
from llamahome.data.records import Microbatch
from llamahome.distributed.reducer import FlatReducer
from llamahome.distributed.world import World
from llamahome.model.attention import ATTENTION_NAME, register_attention
from llamahome.model.backends.choose import backend_of
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import trained_parameters
from llamahome.model.precision import Precision
from llamahome.monitoring.throughput import PartClock
from llamahome.training.optimizer import make_optimizer, set_learning_rate
from llamahome.training.spikes import Limits
from llamahome.training.step import StepResult, train_step

_RATE = 1e-3


class Trained:
    """Model, adapters, optimizer."""

    def __init__(self, shape: Shape, device: torch.device, *, compiled: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        register_attention()
        self.device, self.config = device, Config()
        self.backend = backend_of(device.type, device, Precision(dtype, dtype, "a benchmark"))
        self.model = random_model(shape, device, dtype=dtype, attention=ATTENTION_NAME)
        self.saved = add_lora(self.model, LoraConfig(), base="random", seed=0, lean=True)
        self.model.train()
        self.compiled = compiled and self.backend.cannot_compile() is None
        if self.compiled:
            self.backend.compile(self.model)
        self.parameters = trained_parameters(self.model)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
        self.optimizer = make_optimizer("adamw", self.parameters, weight_decay=0.0)
        set_learning_rate(self.optimizer, _RATE)
        self._objective = Objective(self.model, self.backend)
        self._reducer = FlatReducer(World(0, 1, 0, device), list(self.parameters.values()))
        self._clock, self._steps = PartClock(), 0
        self.waits = self.recompiles = 0

    def step(self, batches: Sequence[Microbatch]) -> StepResult:
        """Copy `batches` to the device and run one optimizer update."""
        delivered = [self.backend.to_device(batch) for batch in batches]
        self._steps += 1
        settings = {"limits": Limits(1.0), "reducer": self._reducer, "clock": self._clock}
        targets = sum(batch.num_targets for batch in batches)
        found = train_step(self._objective.loss_sum, self.optimizer, delivered, divisors=[targets], seed=self._steps, **settings)
        if not isinstance(found, StepResult):
            raise torch.OutOfMemoryError(found.message or "")
        return found

    @contextmanager
    def watched(self, *, warm: bool) -> Iterator[None]:
        """Count waits for the device and recompilations in the block, unless `warm`."""
        if warm:
            yield
            return
        before = _compiled_graphs()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if self.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        self.waits += sum("synchroniz" in str(each.message) for each in caught)
        self.recompiles += _compiled_graphs() - before


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
