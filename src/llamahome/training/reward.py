"""The reward of an answer: a function in a Python file of the user's, the same that evaluates answers (metric_file.py).

The function must give the same answer the same number every time; otherwise a resumed run takes another course.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llamahome.data.text.tokens import ChatTokenizer
from llamahome.training.answers import without_end
from llamahome.training.metric_file import REWARD, UserFunction, load_function


def open_reward(name: str) -> UserFunction:
    """The function FILE.py:FUNCTION. Raises ConfigError if there is none, or if it takes something else than a metric does."""
    return load_function(name, REWARD)


@dataclass(frozen=True)
class Reward:
    """Scores answers in tokens."""

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
