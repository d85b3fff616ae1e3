"""Held-out loss, perplexity and token accuracy, and answers to sample prompts.

The figures are sums over all units of all ranks (targets, or pairs of answers), divided once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from llamahome.data.records import Microbatch
from llamahome.data.steps.layout import EACH_ALONE, Layout
from llamahome.data.steps.loader import Deliver, sequential_microbatches
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.distributed.devices import is_out_of_memory
from llamahome.distributed.reducer import UNGUARDED, Guard
from llamahome.distributed.world import World
from llamahome.model.backends.loss import HeadStats
from llamahome.model.shard import Placement
from llamahome.monitoring.display import metric_name
from llamahome.monitoring.recorder import Recorder
from llamahome.progress_marks import marks
from llamahome.training.answering import generate_answers
from llamahome.training.memory import RanOut, free_cached_memory, smaller_budget
from llamahome.training.objective import TrainingObjective, targets_only

ANSWER_TOKENS = 64
"""Most tokens in the answer to a sample prompt."""
_TEXT_PROMPT_TOKENS = 32
"""Most tokens of a plain text that are used as a sample prompt."""


@dataclass(frozen=True)
class Evaluation:
    """How well the model of one step predicts the held-out rows."""

    loss: float
    """Nats per target, or the loss per unit of another objective."""
    accuracy: float
    """Share of targets that the model ranks first, or of units of another objective that the model gets right."""
    targets: int
    """The number of units."""
    metric: str = "loss"
    """evaluation.metric: what decides whether this evaluation is better than another."""
    score: float | None = None
    """Mean score of generated answers, if that is the metric."""
    unit: str = "target"
    """What the loss is a mean of."""

    @property
    def value(self) -> float:
        """The value of the metric."""
        if self.metric == "loss":
            return self.loss
        return self.accuracy if self.score is None else self.score

    def better(self, than: float) -> bool:
        """Whether the value is better than another value of the same metric."""
        return self.value < than if self.metric == "loss" else self.value > than

    @property
    def noise(self) -> float:
        """How much the loss of the same rows changes by chance from one evaluation to the next: two standard errors, in nats.

        Between two states of a model the loss of a target changes by about one nat, so the error of the mean is 1 / sqrt(targets).
        """
        return 2 / math.sqrt(max(1, self.targets))

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite beyond what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def metrics(self) -> dict[str, float]:
        """Under their public names."""
        scores = {} if self.score is None else {f"eval/{metric_name(self.metric)}": self.score}
        if self.unit != "target":
            return {"eval/loss": self.loss, f"eval/{self.unit}_accuracy": self.accuracy} | scores
        return {"eval/loss": self.loss, "eval/perplexity": self.perplexity, "eval/token_accuracy": self.accuracy} | scores


@torch.no_grad()
def evaluate(
    stats: Callable[[Microbatch], HeadStats],
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    *,
    world: World,
    guard: Guard = UNGUARDED,
    units: Callable[[Microbatch], tuple[int, ...]] = targets_only,
) -> Evaluation | RanOut:
    """Run `model` over the micro-batches of this rank in evaluation mode; all ranks must call it. Reads the device once, at the end.

    The sums of the micro-batches are added up in float64 on the processor, because not every device has float64. RanOut on all ranks if
    memory ran out on one of them; `guard` is that of the passes.
    """
    was_training, ran_out = model.training, None
    model.eval()
    sums = [torch.zeros(2, device=world.device)]
    try:
        for microbatch in microbatches:
            each = stats(microbatch)
            sums.append(torch.stack([each.loss_sum.float(), each.correct.float()]))
            marks.advance()
        sums = [torch.stack(sums).cpu().double().sum(dim=0)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ran_out = RanOut(str(error) or "no more memory")
    finally:
        model.train(was_training)
    if (message := guard.take()) is not None:
        ran_out = RanOut(message)
    counts = [float(sum(units(each)[0] for each in microbatches)), float(ran_out is not None)]
    total = torch.cat([torch.zeros(2) if ran_out is not None else sums[0], torch.tensor(counts, dtype=torch.float64)])
    world.sum_(total)
    loss, correct, targets, gave_up = total.tolist()
    if gave_up:
        return ran_out or RanOut(None)
    return Evaluation(loss / max(1.0, targets), correct / max(1.0, targets), int(targets))


@dataclass(frozen=True)
class HeldOut:
    """The rows of an evaluation, and how they are divided."""

    table: ExampleTable
    tokens: int
    """Most tokens per micro-batch."""
    world: World
    deliver: Deliver
    equal_passes: bool = False
    layout: Layout = EACH_ALONE

    def lay_out(self) -> list[Microbatch]:
        """The share of this rank in every example."""
        return sequential_microbatches(
            self.table,
            micro_batch_tokens=self.tokens,
            rank=self.world.rank,
            world_size=self.world.size,
            equal_passes=self.equal_passes,
            deliver=self.deliver,
            layout=self.layout,
        )


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt and the answer in the data."""

    tokens: list[int]
    prompt: str
    """As the model sees it."""
    shown: str
    """As people read it, without control tokens."""
    reference: str


@dataclass(frozen=True)
class SampleAnswer:
    """The answers of the model to a prompt before and after training."""

    prompt: SamplePrompt
    before: str
    after: str


def sample_prompts(table: ExampleTable, tokenizer: ChatTokenizer, count: int) -> list[SamplePrompt]:
    """Prompts from the first examples of `count` rows of `table`: what is before the last span of targets, with the span as reference."""
    prompts = []
    firsts = [begin for begin, end in pairwise(table.firsts.tolist()) if begin < end]  # of a pair, the better answer
    for number in firsts[:count]:
        example = table.example(number)
        targets = example.targets.nonzero()[0]
        breaks = (targets[1:] - targets[:-1] > 1).nonzero()[0]
        start = int(targets[breaks[-1] + 1] if len(breaks) else targets[0])
        start = min(_TEXT_PROMPT_TOKENS, (len(example.tokens) + 1) // 2) if start < 2 else start
        tokens = example.tokens.tolist()
        prompt, answer = tokens[:start], tokens[start:]
        prompts.append(SamplePrompt(prompt, tokenizer.decode(prompt), tokenizer.decode_plain(prompt), tokenizer.decode_plain(answer)))
    return prompts


@dataclass(frozen=True)
class Judge:
    """What decides whether an evaluation is better than another."""

    metric: str
    """evaluation.metric."""
    mean_score: Callable[[], float] | None = None
    """The value of a metric that needs generated answers; all ranks call it."""


BY_LOSS = Judge("loss")


class Evaluator:
    """Evaluates the model as it is now and lets it answer the sample prompts; keeps the first and the last result of both."""

    def __init__(
        self,
        objective: TrainingObjective,
        placement: Placement,
        tokenizer: ChatTokenizer,
        recorder: Recorder,
        *,
        held_out: HeldOut | None,
        prompts: Sequence[SamplePrompt],
        untrained: dict[str, Any] | None = None,
        judge: Judge = BY_LOSS,
    ) -> None:
        """`held_out` are the rows to evaluate, None when there are none.

        `untrained` is what `results` returned before the first update, from the state of a resumed run.
        """
        self._objective, self._placement, self._tokenizer, self._recorder = objective, placement, tokenizer, recorder
        self._held_out, self._prompts = held_out, prompts
        self._microbatches = held_out.lay_out() if held_out is not None else []
        self._judge = judge
        self._answers: list[list[str]] = [untrained["answers"]] if untrained and untrained["answers"] else []
        """Answers to each prompt, one list per evaluation."""
        self.first = Evaluation(**untrained["evaluation"]) if untrained and untrained["evaluation"] else None
        self.last: Evaluation | None = None

    def evaluate(self, step: int) -> Evaluation | None:
        """Record and return the evaluation after `step` updates; all ranks call it. None without held-out rows."""
        world = self._placement.exchange.world
        if (world.is_main or self._placement.equal_passes) and self._prompts:
            self._answer(step)
        if self._held_out is None:
            return None
        measured = self._measure(self._held_out, step)
        score = self._judge.mean_score() if self._judge.mean_score is not None else None
        self.last = replace(measured, metric=self._judge.metric, score=score, unit=self._objective.unit)
        self.first = self.first or self.last
        self._recorder.log(step, self.last.metrics)
        return self.last

    def _measure(self, held_out: HeldOut, step: int) -> Evaluation:
        """The evaluation, in micro-batches that fit into the memory of all ranks. Raises OutOfMemory if a single example does not fit."""
        world, guard = held_out.world, self._placement.exchange.guard
        stats, model, units = self._objective.stats, self._objective.model, self._objective.units
        while isinstance(found := evaluate(stats, model, self._microbatches, world=world, guard=guard, units=units), RanOut):
            lengths = [microbatch.row_lengths for microbatch in self._microbatches]
            smaller = smaller_budget(found.message, held_out.tokens, lengths, world=world)
            held_out = self._held_out = replace(held_out, tokens=smaller.micro_batch_tokens)
            facts = {"micro_batch_tokens": smaller.micro_batch_tokens, "processes": smaller.ranks}
            self._recorder.event("out-of-memory", step=step, during="evaluation", **facts)
            free_cached_memory()
            self._microbatches = held_out.lay_out()
        return found

    def results(self) -> dict[str, Any]:
        """The last evaluation and the last answers, as JSON values."""
        return {"evaluation": asdict(self.last) if self.last else None, "answers": self._answers[-1] if self._answers else []}

    def samples(self) -> list[SampleAnswer]:
        """Each prompt with its first and its last answer; empty unless it was answered twice."""
        if len(self._answers) < 2:
            return []
        return [SampleAnswer(*each) for each in zip(self._prompts, self._answers[0], self._answers[-1], strict=False)]

    def _answer(self, step: int) -> None:
        tokens, end_ids = [prompt.tokens for prompt in self._prompts], self._tokenizer.all_ends
        model, alone = self._objective.model, not self._placement.equal_passes

        def ran_out(prompts: int) -> None:
            self._recorder.event("out-of-memory", step=step, during="answers", prompts=prompts)

        def answer_all() -> list[list[int]]:
            return generate_answers(model, tokens, end_ids=end_ids, max_new_tokens=ANSWER_TOKENS, alone=alone, ran_out=ran_out)

        ids = self._placement.within(answer_all)
        answers = [self._tokenizer.decode(row) for row in ids]
        self._answers.append(answers)
        for prompt, answer in zip(self._prompts, answers, strict=True):
            self._recorder.sample(step, prompt.prompt, answer, prompt.reference)
