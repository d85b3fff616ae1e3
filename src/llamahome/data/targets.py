"""Conversations to examples: the tokens of each row and which of them are learned, proved against the rendered text.

An assistant turn is learned from the end of the prompt that precedes it to the end of its end-of-turn token. Where a turn lies is found by
rendering the chat up to it with and without it; both must be beginnings of the whole rendering, and the tokens marked must decode to
exactly that stretch of text and end in that token. A row of which this cannot be shown is refused, never guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llamahome.data.records import Conversation, Example
from llamahome.data.tokens import ChatTokenizer, Pieces
from llamahome.data.turns import Finding, problem_at
from llamahome.errors import Problem

TrainOn = Literal["assistant", "all", "last"]
OnOverlong = Literal["truncate", "drop", "split", "error"]


@dataclass(frozen=True)
class _Span:
    """A stretch of the rendered text that is learned."""

    begin: int
    end: int
    last_id: int | None
    """The end-of-turn token with which it must end."""


@dataclass(frozen=True)
class _Layout:
    """A conversation as text with its learned stretches; `before` and `after` are ids put around its tokens."""

    text: str
    spans: tuple[_Span, ...] | None
    """None: every token is learned."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokenized:
    """A whole conversation in tokens, before max_length is applied."""

    conversation: Conversation
    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """What became of one row: its examples (none when it was dropped), and its size before anything was cut."""

    examples: tuple[Example, ...]
    num_tokens: int
    num_targets: int
    outcome: Literal["whole", "truncated", "dropped", "split"]


def encode(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: TrainOn, max_length: int, on_overlong: OnOverlong
) -> list[Encoded | Problem]:
    """Examples of a batch of conversations, in their order, each at most `max_length` tokens long."""
    return [
        whole if isinstance(whole, Problem) else fit(whole, max_length=max_length, on_overlong=on_overlong)
        for whole in tokenize(conversations, tokenizer, train_on=train_on)
    ]


def tokenize(conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: TrainOn) -> list[Tokenized | Problem]:
    """Tokens and targets of whole conversations."""
    layouts: list[_Layout | Problem] = []
    for conversation in conversations:
        try:
            layouts.append(_layout(conversation, tokenizer, train_on=train_on))
        except Finding as finding:
            layouts.append(problem_at(conversation.row, finding))
    pieces = iter(tokenizer.encode([layout.text for layout in layouts if isinstance(layout, _Layout)]))
    return [
        layout if isinstance(layout, Problem) else _mark(conversation, layout, next(pieces), tokenizer)
        for conversation, layout in zip(conversations, layouts, strict=True)
    ]


def fit(whole: Tokenized, *, max_length: int, on_overlong: OnOverlong) -> Encoded | Problem:
    """Apply max_length: cut the end, leave out, split (plain text only), or refuse."""
    count, learned = len(whole.tokens), int(whole.targets.sum())
    if count <= max_length:
        return Encoded((_example(whole, 0, count),), count, learned, "whole")
    if on_overlong == "drop":
        return Encoded((), count, learned, "dropped")
    if on_overlong == "truncate":
        lost = int(whole.targets[max_length:].sum())
        return Encoded((_example(whole, 0, max_length, cut=count - max_length, cut_targets=lost),), count, learned, "truncated")
    if on_overlong == "split" and whole.conversation.text is not None:
        begins = range(0, count, max_length)
        return Encoded(tuple(_example(whole, at, min(at + max_length, count)) for at in begins), count, learned, "split")
    message = f"{count:,} tokens, more than data.max_length {max_length:,}"
    if on_overlong == "split":
        message += "; a chat cannot be split"
    hint = f"--set data.max_length={count}"
    return problem_at(whole.conversation.row, Finding("data.overlong", message, hint=hint))


def _example(whole: Tokenized, begin: int, end: int, *, cut: int = 0, cut_targets: int = 0) -> Example:
    row = whole.conversation.row
    targets = whole.targets[begin:end].copy()
    targets[:1] = False
    return Example(row.source, row.index, row.line, whole.tokens[begin:end], targets, cut, cut_targets)


def _layout(conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: TrainOn) -> _Layout:
    if conversation.text is not None:
        return _text_layout(conversation.text, tokenizer)
    for number, turn in enumerate(conversation.turns):
        control = tokenizer.control_token_in(turn["content"])
        if control is not None:
            raise Finding(
                "data.control-token-in-text",
                f"turn {number} ({turn['role']}) contains {control}, which the model reads as a control token",
                hint=f'write it differently, like "{control[0]} {control[1:]}", or remove the row',
                part=turn["content"][max(0, turn["content"].index(control) - 40) :],
            )
    turns, last = conversation.turns, len(conversation.turns) - 1
    whole = tokenizer.render(turns)
    end_id = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    if train_on == "all":
        lacks_end = turns[-1]["role"] == "assistant" and whole.rstrip().endswith(turns[-1]["content"].rstrip())
        return _Layout(whole.rstrip() if lacks_end else whole, None, after=end_id if lacks_end else ())
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number not in conversation.context_only]
    spans = [_span(turns, number, whole, tokenizer) for number in (answers[-1:] if train_on == "last" else answers)]
    if answers[-1] == last and spans[-1].last_id is None:
        return _Layout(whole[: spans[-1].end], tuple(spans), after=end_id)
    return _Layout(whole, tuple(spans))


def _text_layout(text: str, tokenizer: ChatTokenizer) -> _Layout:
    begins = tokenizer.adds_bos and not text.startswith(tokenizer.bos_token or "\0")
    ends = tokenizer.eos_id is not None and not text.endswith(tokenizer.eos_token or "\0")
    before = (tokenizer.bos_id,) if begins and tokenizer.bos_id is not None else ()
    after = (tokenizer.eos_id,) if ends and tokenizer.eos_id is not None else ()
    return _Layout(text, None, before, after)


def _span(turns: Sequence[dict[str, str]], number: int, whole: str, tokenizer: ChatTokenizer) -> _Span:
    """Where assistant turn `number` and its end lie in the whole rendering; raises Finding when the template hides it."""
    before = tokenizer.render(turns[:number], add_generation_prompt=True)
    through = whole if number == len(turns) - 1 else tokenizer.render(turns[: number + 1])
    if not whole.startswith(through):
        raise _unproved(number, "it writes the turn differently once later turns follow")
    if not through.startswith(before):
        raise _unproved(number, "its generation prompt is not how it begins the turn in a finished chat")
    tail, content = through[len(before) :], turns[number]["content"].strip()
    at = len(tail) - len(tail.lstrip())
    if not tail.startswith(content, at):
        raise _unproved(number, f"it changes the assistant's text, which becomes {tail[at : at + 60]!r}")
    at += len(content)
    rest = tail[at:].lstrip()
    end = tokenizer.added_token_at(rest)
    if end is not None:
        return _Span(len(before), len(before) + len(tail) - len(rest) + len(end), tokenizer.added_tokens[end])
    if rest:
        raise _unproved(number, f"after the assistant's text it writes {rest[:30]!r}, which is not a token that ends a turn")
    return _Span(len(before), len(before) + at, None)


def _unproved(number: int, reason: str) -> Finding:
    message = f"it cannot be shown which tokens of turn {number} are learned: of the model's chat template, {reason}"
    hint = "--set model.chat_template=FILE.jinja with a template that writes each turn the same everywhere, or --set data.train_on=all"
    return Finding("data.mask-unproved", message, hint=hint)


def _mark(conversation: Conversation, layout: _Layout, pieces: Pieces, tokenizer: ChatTokenizer) -> Tokenized | Problem:
    """Targets of one row: from the tokens of the whole text, else from the text tokenized in parts, else a Problem."""
    ids, spans = pieces.ids, layout.spans
    if spans is None:
        targets = np.ones(len(ids), np.bool_)
    else:
        ranges = [(int(a), int(b)) for a, b in (np.searchsorted(pieces.starts, (span.begin, span.end)) for span in spans)]
        if not all(_proved(ids, found, layout.text, span, tokenizer) for found, span in zip(ranges, spans, strict=True)):
            ids, ranges = _in_parts(layout.text, spans, tokenizer)
            for found, span in zip(ranges, spans, strict=True):
                if not _proved(ids, found, layout.text, span, tokenizer):
                    return problem_at(conversation.row, _lossy(layout.text[span.begin : span.end]))
        targets = np.zeros(len(ids), np.bool_)
        for begin, end in ranges:
            targets[begin:end] = True
    tokens = np.concatenate((np.array(layout.before, np.int32), ids, np.array(layout.after, np.int32)))
    targets = np.concatenate((np.ones(len(layout.before), np.bool_), targets, np.ones(len(layout.after), np.bool_)))
    targets[:1] = False
    return Tokenized(conversation, tokens, targets)


def _lossy(text: str) -> Finding:
    message = "the tokenizer cannot write the answer: its tokens do not decode to the same text"
    return Finding("data.not-representable", message, hint="remove the row, or the characters that the model does not know", part=text)


def _in_parts(text: str, spans: Sequence[_Span], tokenizer: ChatTokenizer) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
    """Tokens of the text cut at the borders of its spans, and which of them each span is."""
    borders = [0, *(border for span in spans for border in (span.begin, span.end)), len(text)]
    parts = [part.ids for part in tokenizer.encode([text[a:b] for a, b in pairwise(borders)])]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return np.concatenate(parts), [(ends[2 * number], ends[2 * number + 1]) for number in range(len(spans))]


def _proved(ids: NDArray[np.int32], found: tuple[int, int], text: str, span: _Span, tokenizer: ChatTokenizer) -> bool:
    """Whether the tokens in the range are the span's text, all of it and nothing else, and end in its end-of-turn token."""
    begin, end = found
    wanted = text[span.begin : span.end]
    if begin >= end or (span.last_id is not None and int(ids[end - 1]) != span.last_id):
        return False
    if tokenizer.decode(ids[begin:end]) == wanted:
        return True
    before, through = tokenizer.decode(ids[:begin]), tokenizer.decode(ids[:end])
    if not through.startswith(before):
        return False
    return through[len(before) :] == wanted or tokenizer.normalize(through[len(before) :]) == tokenizer.normalize(wanted)
