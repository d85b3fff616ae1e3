"""Between two log steps nothing waits for the device: a GPU works while the next step is prepared."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import FP32, examples_of, save_tiny
from tests.support.runs import Method, RunOptions, close_run, make_learner, make_run, table_of
from torch.utils._python_dispatch import TorchDispatchMode

from llamahome.data.steps.loader import make_microbatch
from llamahome.distributed.reducer import FlatReducer
from llamahome.distributed.world import World
from llamahome.model.backends.choose import backend_of
from llamahome.model.objective import Objective
from llamahome.monitoring.throughput import PartClock
from llamahome.training.loop import train
from llamahome.training.run import first_state
from llamahome.training.spikes import Limits
from llamahome.training.step import train_step

WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "masked_select", "unique", "unique_dim")
"""Operators whose answer the processor needs: item(), float(), int(), bool() and sizes that depend on values."""
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = [9, 25, 14, 3, 30, 7, 18, 11]


class WaitingOperators(TorchDispatchMode):
    """Counts the operators of this thread that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def waits(llama: Path, folder: Path, method: Method, *, steps: int, log: str) -> Counter[str]:
    learner = make_learner(llama, method)
    run = make_run(learner, RunOptions(table_of(examples_of(LENGTHS)), folder, steps=steps, log_every=log, save=lambda state: folder))
    with WaitingOperators() as operators:
        train(run, first_state(60))
    close_run(run)
    return operators.waits


@pytest.mark.parametrize("method", ["lora", "full"])
def test_more_steps_between_two_log_steps_read_no_value_from_the_device(llama: Path, tmp_path: Path, method: Method) -> None:
    few, many = (waits(llama, tmp_path / str(steps), method, steps=steps, log="100 steps") for steps in (3, 9))
    assert few == many


def test_the_counter_sees_what_waits() -> None:
    with WaitingOperators() as operators:
        assert float(torch.ones(3).sum()) == 3.0 and bool(torch.ones(()) > 0) and torch.ones(2).sum().item() == 2
    assert operators.waits == {"_local_scalar_dense": 3}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_CUDA
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_on_a_gpu_never_waits_for_it(llama: Path, method: Method) -> None:
    cuda = torch.device("cuda", 0)
    learner = make_learner(llama, method)
    model = learner.objective.model.to(cuda)
    world = World(0, 1, 0, cuda)
    backend = backend_of("cuda", cuda, FP32)
    objective = Objective(model, backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    examples = examples_of(LENGTHS)
    exchange = FlatReducer(world, [p for p in model.parameters() if p.requires_grad])
    microbatches = [backend.to_device(make_microbatch(examples, keys=range(len(examples)), index=0))]

    def step() -> None:
        targets = sum(each.num_targets for each in microbatches)
        settings = {"divisors": [targets], "seed": 0, "limits": Limits(1.0), "reducer": exchange, "clock": PartClock()}
        train_step(objective.loss_sum, optimizer, microbatches, **settings)

    step()  # the first one makes the optimizer's state and loads kernels
    with no_waiting():
        step()


@NEEDS_CUDA
def test_micro_batches_reach_a_gpu_without_waiting() -> None:
    laid_out = make_microbatch(examples_of([5, 3]), keys=(0, 1), index=0)
    with no_waiting():  # a copy from memory that is not pinned would wait
        batch = backend_of("cuda", torch.device("cuda", 0), FP32).to_device(laid_out)
    assert batch.tokens_T.is_cuda and torch.equal(batch.labels_N.cpu(), laid_out.labels_N)
