"""Rows as the model sees them, token by token: learned, context, or cut off by max_length. `data show` prints them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import Source
from llamahome.data.prepare import first_format
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.data.store.pairs import learned_of, sides, together
from llamahome.data.text.render import TrainOn
from llamahome.data.text.targets import Encoded, Tokenized, encode, fit, tokenize
from llamahome.data.text.tokens import ChatTokenizer, require_chat_template
from llamahome.errors import Problem

Kind = Literal["learned", "context", "cut", "reference"]
"""A reference is the answer of a row where the model learns from answers of its own, or the end that stands for a missing one."""
Answer = Literal["", "chosen", "rejected", "good", "bad"]
Only = Literal["cut", "no-target"]
"""Only rows that lose tokens to data.max_length, or only rows of which nothing is learned."""


@dataclass(frozen=True)
class ShownRow:
    """One row in tokens; `texts` joined are the whole rendering."""

    row: Row
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    kinds: tuple[Kind, ...]
    answer: Answer = ""
    """Which answer of a pair it is, or how the answer is labelled."""

    def as_json(self) -> dict[str, Any]:
        """The object that `data show --json` prints; only tokens that are cut have "cut", and only those of a reference "reference"."""
        tokens = [
            {"id": number, "text": text, "target": kind == "learned"} | ({kind: True} if kind in ("cut", "reference") else {})
            for number, text, kind in zip(self.ids, self.texts, self.kinds, strict=True)
        ]
        pair = {"answer": self.answer} if self.answer else {}
        return {"row": self.row.index, "source": self.row.source, **pair, "tokens": tokens}

    def spans(self) -> Iterator[tuple[Kind, str, int]]:
        """Runs of tokens of one kind: kind, text, number of tokens."""
        for kind, run in groupby(zip(self.kinds, self.texts, strict=True), itemgetter(0)):
            texts = [text for _, text in run]
            yield kind, "".join(texts), len(texts)


@dataclass(frozen=True)
class RowSize:
    """One row in numbers of tokens."""

    tokens: int
    """Before max_length is applied."""
    needed: int
    """The max_length that keeps all of them: of a pair, the longer answer with its prompt."""
    trained: int
    """In the examples that the row becomes."""
    learned: int


def sizes(source: Source, numbers: Sequence[int], data: DataConfig, tokenizer: ChatTokenizer, *, learned: bool = True) -> Iterator[RowSize]:
    """The sizes of these rows, tokenized together; rows that a run would refuse are left out. `learned` is whether their answers are."""
    detected = _format_of(source, data, tokenizer)
    rows = [source.parsed(number) for number in numbers]
    found = [row if isinstance(row, Problem) else understand(row, detected, data.columns) for row in rows]
    chats = [conversation for conversation in found if not isinstance(conversation, Problem)]
    flat, train_on = [side for conversation in chats for side in sides(conversation)], learned_of(detected, data)
    each = iter(encode(flat, tokenizer, train_on=train_on, max_length=data.max_length, on_overlong=data.on_overlong))
    for conversation in chats:
        encoded = together([next(each) for _ in sides(conversation)])
        if not isinstance(encoded, Problem):
            trained = sum(len(example.tokens) for example in encoded.examples)
            answers = sum(int(example.targets.sum()) for example in encoded.examples)
            yield RowSize(encoded.num_tokens, encoded.needed, trained, answers * learned)


def _format_of(source: Source, data: DataConfig, tokenizer: ChatTokenizer) -> str:
    detected = first_format(source, data.format, data.columns)
    if detected.name != "text":
        require_chat_template(tokenizer, what=f"the rows are chats ({detected.name})")
    return detected.name


def view(
    source: Source,
    numbers: Iterable[int],
    data: DataConfig,
    tokenizer: ChatTokenizer,
    *,
    only: Only | None = None,
    learned: bool = True,
) -> Iterator[ShownRow | Problem]:
    """These rows with the tokens and targets that a training run gives them; a Problem for a row that it would refuse.

    A pair of answers is shown as two, the better one first. Answers that are not `learned` are references.
    """
    detected = _format_of(source, data, tokenizer)
    for number in numbers:
        row = source.parsed(number)
        conversation = row if isinstance(row, Problem) else understand(row, detected, data.columns)
        if isinstance(conversation, Problem):
            yield conversation
            continue
        for shown in _view_one(conversation, data, tokenizer, only=only, train_on=learned_of(detected, data)):
            if not learned and isinstance(shown, ShownRow):
                yield replace(shown, kinds=tuple("reference" if kind == "learned" else kind for kind in shown.kinds))
            elif detected == "labelled" and isinstance(shown, ShownRow):
                yield replace(shown, answer="good" if conversation.good else "bad")
            else:
                yield shown


def _view_one(
    conversation: Conversation, data: DataConfig, tokenizer: ChatTokenizer, *, only: Only | None, train_on: TrainOn
) -> Iterator[ShownRow | Problem]:
    found: list[tuple[Tokenized, Encoded]] = []
    for whole in tokenize(sides(conversation), tokenizer, train_on=train_on):
        if isinstance(whole, Problem):
            yield whole
            return
        encoded = fit(whole, max_length=data.max_length, on_overlong=data.on_overlong)
        if isinstance(encoded, Problem):
            yield encoded
            return
        found.append((whole, encoded))
    row = together([encoded for _, encoded in found])
    if only is not None and not (isinstance(row, Encoded) and _is(only, row)):
        return
    names: Sequence[Answer] = ("chosen", "rejected") if conversation.other else ("",)
    for name, (whole, encoded) in zip(names, found, strict=True):
        yield replace(_shown(whole, encoded, tokenizer), answer=name)


def _is(only: Only, encoded: Encoded) -> bool:
    if only == "cut":
        return encoded.outcome in ("truncated", "dropped")
    return not any(example.targets.any() for example in encoded.examples)


def _shown(whole: Tokenized, encoded: Encoded, tokenizer: ChatTokenizer) -> ShownRow:
    targets = np.concatenate([np.empty(0, np.bool_), *(example.targets for example in encoded.examples)])
    kinds: list[Kind] = ["learned" if target else "context" for target in targets]
    kinds += ["cut"] * (len(whole.tokens) - len(kinds))
    ids = [int(number) for number in whole.tokens]
    return ShownRow(whole.conversation.row, tuple(ids), tuple(tokenizer.texts(ids)), tuple(kinds))
