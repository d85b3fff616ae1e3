"""A conversation with one model or with two that are compared: its turns, undoing them, and saving them as training data."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.errors import Problem, UsageError

if TYPE_CHECKING:
    from llamahome.conversation import Answer, ChatModel
    from llamahome.model.sampling import Sampling

Write = Callable[[str], None]
Turns = list[dict[str, str]]


def readable(text: str) -> str:
    """`text` with a replacement character for every byte that was not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _silent(text: str) -> None:
    """Write nothing."""


@dataclass(frozen=True)
class Exchange:
    """A question with the answer of the model and, in a comparison, of the model beside it."""

    question: str
    answer: "Answer"
    beside: "Answer | None"


class Dialogue:
    """The turns so far. Each of two compared models sees the same questions and its own answers."""

    def __init__(self, model: "ChatModel", beside: "ChatModel | None", *, sampling: "Sampling", names: tuple[str, str] = ("", "")) -> None:
        self.model, self.beside, self.sampling = model, beside, sampling
        self.name, self.beside_name = names
        self.system: str | None = None
        self.exchanges: list[Exchange] = []
        self.told_of_length = False
        """Whether it was said that the conversation is longer than the model was trained on."""

    def clear(self) -> None:
        """Begin a new conversation with the same system message."""
        self.exchanges.clear()
        self.told_of_length = False

    def set_system(self, text: str | None) -> None:
        """Change the system message. Raises DataError, and changes nothing, if the template of a model refuses it."""
        if text:
            for model in (self.model, self.beside):
                if model is not None:
                    model.encode([{"role": "system", "content": text}, {"role": "user", "content": "a"}])
        self.system = text or None

    def ask(
        self, question: str, *, write: Write = _silent, write_beside: Write = _silent, cancelled: Callable[[], bool] = lambda: False
    ) -> Exchange:
        """Both answers, the base's first. A question without an answer, after an error or an interrupt, is no part of the conversation.

        Raises DataError if a template refuses the conversation, and ConfigError if it is too long.
        """
        prompt = self.model.encode(self.turns(question))
        other = None
        if self.beside is not None:
            prompt_beside = self.beside.encode(self.turns(question, beside=True))
            other = self.beside.answer(prompt_beside, self.sampling, write=write_beside, cancelled=cancelled)
        exchange = Exchange(question, self.model.answer(prompt, self.sampling, write=write, cancelled=cancelled), other)
        if exchange.answer.finish != "cancelled" or exchange.answer.text:
            self.exchanges.append(exchange)
        return exchange

    def turns(self, question: str | None = None, *, beside: bool = False) -> Turns:
        """The conversation with the model, or with the one beside it, as messages; a further `question` at its end."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            answer = exchange.beside if beside else exchange.answer
            assert answer is not None
            turns += [{"role": "user", "content": exchange.question}, {"role": "assistant", "content": answer.text}]
        return [*turns, {"role": "user", "content": question}] if question is not None else turns

    def save(self, path: Path) -> None:
        """Write the conversation as one row of training data. Raises UsageError with the reason if it cannot be one."""
        if reason := self._why_not(path):
            raise UsageError(Problem(code="usage.not-saved", message=reason, where=str(path)))
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.turns()}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UsageError(Problem(code="usage.not-saved", message=error.strerror or str(error), where=str(path))) from error

    def _why_not(self, path: Path) -> str | None:
        if not self.exchanges:
            return "there is no answer to save yet"
        if path.suffix != ".jsonl":
            return "a file that `llamahome train` reads as messages ends in .jsonl"
        if path.exists() or path.is_symlink():
            return "the file exists already, and nothing is overwritten: take another name"
        for number, exchange in enumerate(self.exchanges, 1):
            if not exchange.answer.text.strip() or not exchange.question.strip():
                return f"answer {number} is empty, and training refuses empty turns: /undo removes the last question and its answer"
            for text in (exchange.question, exchange.answer.text, self.system or ""):
                if token := self.model.tokenizer.control_token_in(text):
                    return f"exchange {number} holds the control token {token}, which training refuses in a text"
        return None
