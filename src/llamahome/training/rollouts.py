"""Steps whose examples are the model's own answers: between the loader of the rows and the loop, prompts become answers with advantages.

A step's rows are its prompts. The model as it is at that step draws a group of answers to each, a function rewards them, and the advantage
of an answer is its reward less the mean of its group (arXiv 2402.03300). Dividing by the standard deviation of the group is a setting that
is off, because it gives prompts that are nearly solved or nearly hopeless more weight than the others (Dr. GRPO, arXiv 2503.20783).

Every draw is seeded by (seed, position in the data, number of the answer), so a resumed run draws the same answers, bit for bit on the same
ranks. On another number of ranks an answer shares its batch with others, which changes its logits by rounding, and a near tie may fall
differently. All ranks learn of all answers, and lay them out as any examples.
"""

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamahome.data.steps.answered import Answer, Prompt, lay_out_answers, prompts_of_step
from llamahome.data.steps.loader import Loader, Place, StepBatch
from llamahome.data.store.counts import Counts
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import OutOfMemory, Problem
from llamahome.model.generate import draw_answers, positions_of
from llamahome.model.load import CausalLM
from llamahome.model.sampling import Sampling
from llamahome.model.shard import Placement
from llamahome.monitoring.throughput import PartClock
from llamahome.training.answering import batch_tokens_of, each_batch, in_batches
from llamahome.training.answers import without_end
from llamahome.training.metric_file import UserFunction


@dataclass(frozen=True)
class Reward:
    """Scores answers in tokens by a function of the user's, which must give the same answer the same number every time.

    Otherwise a resumed run takes another course.
    """

    function: UserFunction
    tokenizer: ChatTokenizer
    row_of: Callable[[int], dict[str, Any]]
    """The row of the source with this number, for functions that read it."""

    def score(self, prompt: tuple[int, ...], answer: list[int], reference: tuple[int, ...], *, row: int, where: str) -> float:
        """The reward. Texts are without the end token and white space at their ends; the prompt is as the model sees it.

        Raises ConfigError with the place of the row if the function raises or returns no finite number.
        """
        decode, ends = self.tokenizer.decode, self.tokenizer.all_ends
        texts = [decode(without_end(ids, ends)).strip() for ids in (answer, reference)]
        whole = self.row_of(row) if self.function.third == "row" else None
        return self.function.score(decode(prompt), texts[0], texts[1], row=whole, where=where)


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn and judged."""

    group_size: int
    sampling: Sampling
    reward: Reward
    divide_by_std: bool
    seed: int

    def numbers(self, prompt: Prompt, begin: int) -> range:
        """The numbers of the answers to a prompt in the step that begins at position `begin`."""
        first = (prompt.position - begin) * self.group_size
        return range(first, first + self.group_size)

    def of_step(self, begin: int) -> Sampling:
        """The sampling of the step that begins at this position."""
        digest = hashlib.sha256(f"rollouts {self.seed} {begin}".encode()).digest()
        return replace(self.sampling, seed=int.from_bytes(digest[:8], "big") >> 2)


class AnsweredSteps:
    """Steps of answers to the prompts of a loader; each is drawn when the loop asks for it, with the weights of that moment."""

    def __init__(self, prompts: Loader, drawing: Drawing, model: CausalLM, placement: Placement, clock: PartClock) -> None:
        self._prompts, self._drawing, self._model, self._placement, self._clock = prompts, drawing, model, placement, clock
        prompts.lays_out = False  # only answers are laid out
        self._answers: list[Answer] = []
        """Of the last step, for another layout of it."""

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens of a micro-batch."""
        return self._prompts.micro_batch_tokens

    @property
    def seen(self) -> Counts:
        """What became of the rows."""
        return self._prompts.seen

    @property
    def row_names(self) -> Callable[[Sequence[int]], list[str]]:
        """Names of rows, for messages."""
        return self._prompts.row_names

    def rows_of(self, begin: int, end: int) -> list[int]:
        """The rows of the source at these positions."""
        return self._prompts.rows_of(begin, end)

    def close(self) -> None:
        """Stop reading ahead."""
        self._prompts.close()

    def __iter__(self) -> "AnsweredSteps":
        return self

    def __next__(self) -> StepBatch:
        batch = next(self._prompts)
        with self._clock.part("rollout"):
            self._answers = self._draw(batch)
        return self._laid_out(batch, batch.micro_batch_tokens)

    def lay_out_again(self, batch: StepBatch, micro_batch_tokens: int) -> StepBatch:
        """The answers of the last step with another budget, which holds for every later step, too."""
        self._prompts.micro_batch_tokens = micro_batch_tokens
        return self._laid_out(batch, micro_batch_tokens)

    def _laid_out(self, batch: StepBatch, micro_batch_tokens: int) -> StepBatch:
        prompts = self._prompts
        place, deliver = Place(prompts.rank, prompts.world_size, prompts.equal_passes), prompts.deliver
        laid = lay_out_answers(self._answers, micro_batch_tokens=micro_batch_tokens, place=place, deliver=deliver)
        return replace(batch, microbatches=laid, micro_batch_tokens=micro_batch_tokens)

    def _draw(self, batch: StepBatch) -> list[Answer]:
        """The answers to all prompts of a step, the same on all ranks, each of which draws and rewards its share of the prompts."""
        world, together = self._placement.exchange.world, self._placement.equal_passes
        prompts = prompts_of_step(self._prompts, batch)
        mine = prompts if together else prompts[world.rank :: world.size]  # parts of weights are gathered by all ranks at once
        drawn = self._placement.within(lambda: self._generate(mine, batch.begin))
        judged = [[number, ids, ended, self._reward(prompt, ids)] for prompt, number, ids, ended in drawn]
        told = world.broadcast_object(judged) if together else [each for share in world.gather(judged) for each in share]
        by_number = {number: _Drawn(tuple(ids), ended, reward) for number, ids, ended, reward in told}
        return [answer for prompt in prompts for answer in self._judged(prompt, by_number, batch.begin)]

    def _judged(self, prompt: Prompt, by_number: Mapping[int, "_Drawn"], begin: int) -> list[Answer]:
        """The group of a prompt with its advantages."""
        group = [by_number[number] for number in self._drawing.numbers(prompt, begin)]
        found = advantages([each.reward for each in group], divide_by_std=self._drawing.divide_by_std)
        return [
            Answer(prompt, each.tokens, advantage, (each.reward, found.std, len(each.tokens), not each.ended, found.std == 0))
            for each, advantage in zip(group, found.values, strict=True)
        ]

    def _reward(self, prompt: Prompt, ids: list[int]) -> float:
        where = f"{prompt.source}:{prompt.line}"
        return self._drawing.reward.score(prompt.tokens, ids, prompt.reference, row=prompt.row, where=where)

    def _generate(self, prompts: Sequence[Prompt], begin: int) -> list[tuple[Prompt, int, list[int], bool]]:
        """Every answer with its prompt, its number and whether it ended; batches that do not fit into memory are halved."""
        drawing, sampling = self._drawing, self._drawing.of_step(begin)
        wanted = [(prompt, number) for prompt in prompts for number in drawing.numbers(prompt, begin)]
        budget, positions = batch_tokens_of(self._model), positions_of(self._model)
        waiting = in_batches(wanted, lambda each: len(each[0].tokens), sampling.max_new_tokens, budget=budget, positions=positions)

        def draw(batch: list[tuple[Prompt, int]]) -> list[tuple[list[int], bool]]:
            tokens, numbered = [prompt.tokens for prompt, _ in batch], replace(sampling, numbers=tuple(number for _, number in batch))
            return draw_answers(self._model, tokens, end_ids=drawing.reward.tokenizer.all_ends, sampling=numbered)

        def refusal(batch: list[tuple[Prompt, int]]) -> OutOfMemory:
            return _does_not_fit([prompt for prompt, _ in batch], sampling)

        drawn = each_batch(waiting, draw, alone=not self._placement.equal_passes, refusal=refusal)
        return [(*each, *answer) for batch, answers in drawn for each, answer in zip(batch, answers, strict=True)]


@dataclass(frozen=True)
class _Drawn:
    """An answer to a prompt."""

    tokens: tuple[int, ...]
    ended: bool
    reward: float


@dataclass(frozen=True)
class Advantages:
    """Of a group of answers, and the standard deviation of their rewards."""

    values: list[float]
    std: float


def advantages(rewards: Sequence[float], *, divide_by_std: bool) -> Advantages:
    """Each reward less the mean of the group, divided by the standard deviation if that is wanted; all 0 if the rewards are equal."""
    if min(rewards) == max(rewards):
        return Advantages([0.0] * len(rewards), 0.0)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return Advantages([(reward - mean) / (std if divide_by_std else 1.0) for reward in rewards], std)


def _does_not_fit(prompts: Sequence[Prompt], sampling: Sampling) -> OutOfMemory:
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    tokens, room = len(longest.tokens), sampling.max_new_tokens
    what = f"a prompt of {tokens:,} tokens and an answer of {room:,}"
    if len(prompts) > 1:
        what = f"{len(prompts)} prompts of at most {tokens:,} tokens with answers of {room:,}"
    message = f"{what} do not fit into memory"
    hint = f"--set grpo.max_new_tokens={max(1, sampling.max_new_tokens // 2)}"
    return OutOfMemory(Problem(code="training.rollout-out-of-memory", message=message, where=f"{longest.source}:{longest.line}", hint=hint))
