"""What drawing answers adds to a step of grpo: the tokens that are learned, and the time of generating them, as `plan` tells it.

Every answer is taken to be as long as grpo.max_new_tokens allows, so the plan is an upper bound: answers that end earlier cost less.
"""

from dataclasses import dataclass

from llamahome.config.schema import Config
from llamahome.data.report import DataReport
from llamahome.training.answering import in_batches


@dataclass(frozen=True)
class Rollout:
    """The answers of a step, on one process."""

    answers: int
    prompt_tokens: int
    """Of each answer's prompt, on average."""
    answer_tokens: int
    """Most of each answer."""
    batches: int
    """How many batches they are drawn in, one after another."""
    passes: int
    """Further forward passes over everything, as that of the divergence."""

    @property
    def tokens(self) -> int:
        """Tokens of the step, prompts included."""
        return self.answers * (self.prompt_tokens + self.answer_tokens)

    @property
    def target_share(self) -> float:
        """Share of them that is learned."""
        return self.answer_tokens / (self.prompt_tokens + self.answer_tokens)

    def pass_tokens(self, per_answer_token: float) -> float:
        """Tokens of a forward pass that take as long as drawing all answers.

        A token of a batch costs `per_answer_token`, which is the same for few answers as for one, and one for each of its answers.
        """
        generated = self.answer_tokens * (self.batches * per_answer_token + self.answers)
        return self.answers * self.prompt_tokens + generated + self.passes * self.tokens


def rollout_of(config: Config, report: DataReport, rows: int) -> Rollout | None:
    """What a step over `rows` rows draws; None unless training.objective is grpo."""
    if config.training.objective != "grpo":
        return None
    grpo, answers = config.grpo, rows * config.grpo.group_size
    prompt = max(1, round(report.tokens_per_row * (1 - report.answer_share)))
    batches = len(in_batches([prompt] * answers, int, grpo.max_new_tokens, positions=None))
    return Rollout(answers, prompt, grpo.max_new_tokens, batches, passes=1 if grpo.beta else 0)
