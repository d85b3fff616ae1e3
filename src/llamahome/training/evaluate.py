"""Held-out loss, perplexity and token accuracy: sums over all targets of all ranks, divided once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llamahome.data.records import Microbatch
from llamahome.distributed.world import World


class Stats(Protocol):
    """Sums over the targets of one micro-batch."""

    @property
    def loss_sum(self) -> Tensor: ...  # noqa: D102
    @property
    def correct(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Evaluation:
    """What the model of one step does on the held-out rows."""

    loss: float
    """Nats per target."""
    accuracy: float
    """Share of targets that the model ranks first."""
    targets: int

    @property
    def noise(self) -> float:
        """How far the loss of the same rows moves from one evaluation to another by chance: two standard errors, in nats.

        Between two states of a model the loss of a target moves by about one nat, so the error of the mean is 1 / sqrt(targets).
        """
        return 2 / math.sqrt(max(1, self.targets))

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite beyond what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def metrics(self) -> dict[str, float]:
        """Under their public names."""
        return {"eval/loss": self.loss, "eval/perplexity": self.perplexity, "eval/token_accuracy": self.accuracy}


@torch.no_grad()
def evaluate(
    stats: Callable[[Microbatch], Stats], model: torch.nn.Module, microbatches: Sequence[Microbatch], *, world: World
) -> Evaluation:
    """Run `model` over this rank's micro-batches in evaluation mode; all ranks must call it. Reads the device once, at the end.

    What the micro-batches came to is added up in float64 behind that read: not every device has such numbers.
    """
    was_training = model.training
    model.eval()
    found = [torch.zeros(2, device=world.device)]
    try:
        for microbatch in microbatches:
            sums = stats(microbatch)
            found.append(torch.stack([sums.loss_sum.float(), sums.correct.float()]))
    finally:
        model.train(was_training)
    targets = float(sum(microbatch.num_targets for microbatch in microbatches))
    total = torch.cat([torch.stack(found).cpu().double().sum(dim=0), torch.tensor([targets], dtype=torch.float64)])
    world.sum_(total)
    loss, correct, targets = total.tolist()
    return Evaluation(loss / max(1.0, targets), correct / max(1.0, targets), int(targets))
