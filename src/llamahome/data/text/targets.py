"""Conversations to examples: the tokens of each row and which of them are learned, proved against the rendered text.

The chat is rendered once and tokenized as a whole; layout.py knows which stretches of the text are answers. The tokens must write exactly
that text, byte for byte, and one must end at each border of an answer; otherwise the answers are decoded and compared, after the text was
tokenized in parts if need be. A row of which neither can be shown is refused, never guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llamahome.data.records import Conversation, Example
from llamahome.data.rows.fault import Finding, problem_at
from llamahome.data.text.layout import Layout, TrainOn, lay_out
from llamahome.data.text.spans import Span
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import Problem

OnOverlong = Literal["truncate", "drop", "split", "error"]


@dataclass(frozen=True)
class Tokenized:
    """A whole conversation in tokens, before max_length is applied."""

    conversation: Conversation
    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]


@dataclass(frozen=True)
class _Marked:
    """Tokens of a text, and the ranges of them that are learned."""

    ids: NDArray[np.int32]
    ranges: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """What became of one row: its examples (none when it was dropped), and its size before anything was cut."""

    examples: tuple[Example, ...]
    num_tokens: int
    num_targets: int
    outcome: Literal["whole", "truncated", "dropped", "split"]
    lost: tuple[tuple[int, int], ...] = ()
    """Targets cut off or left out: (length, count), `count` of them would be there with a max_length of `length`, a multiple of 64.
    The first token of each part of a split row, which nothing predicts, is not among them."""


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
    layouts: list[Layout | Problem] = []
    for conversation in conversations:
        try:
            layouts.append(lay_out(conversation, tokenizer, train_on=train_on))
        except Finding as finding:
            layouts.append(problem_at(conversation.row, finding))
    ids = iter(tokenizer.encode_ids([layout.text for layout in layouts if isinstance(layout, Layout)]))
    return [
        layout if isinstance(layout, Problem) else _mark(conversation, layout, next(ids), tokenizer)
        for conversation, layout in zip(conversations, layouts, strict=True)
    ]


def fit(whole: Tokenized, *, max_length: int, on_overlong: OnOverlong) -> Encoded | Problem:
    """Apply max_length: cut the end, leave out, split (plain text only), or refuse."""
    count, learned = len(whole.tokens), int(whole.targets.sum())
    if count <= max_length:
        row = whole.conversation.row
        example = Example(row.source, row.index, row.line, whole.tokens, whole.targets)
        return Encoded((example,), count, learned, "whole")
    if on_overlong == "drop":
        return Encoded((), count, learned, "dropped", ((_rounded(count), learned),) if learned else ())
    if on_overlong == "truncate":
        places = np.flatnonzero(whole.targets[max_length:]) + max_length + 1
        kept = _example(whole, 0, max_length, cut=count - max_length, cut_targets=len(places))
        lengths, counts = np.unique(_rounded(places), return_counts=True)
        return Encoded((kept,), count, learned, "truncated", tuple(zip(lengths.tolist(), counts.tolist(), strict=True)))
    if on_overlong == "split" and whole.conversation.text is not None:
        begins = range(0, count, max_length)
        examples = tuple(_example(whole, at, min(at + max_length, count)) for at in begins)
        return Encoded(examples, count, learned, "split")
    message = f"{count:,} tokens, more than data.max_length {max_length:,}"
    if on_overlong == "split":
        message += "; a chat cannot be split"
    hint = f"--set data.max_length={count}"
    return problem_at(whole.conversation.row, Finding("data.overlong", message, hint=hint))


def _rounded(length: Any) -> Any:
    """Up to the next multiple of 64."""
    return -(-length // 64) * 64


def _example(whole: Tokenized, begin: int, end: int, *, cut: int = 0, cut_targets: int = 0) -> Example:
    row = whole.conversation.row
    targets = whole.targets[begin:end].copy()
    targets[:1] = False
    return Example(row.source, row.index, row.line, whole.tokens[begin:end], targets, cut, cut_targets)


def _mark(conversation: Conversation, layout: Layout, ids: Sequence[int], tokenizer: ChatTokenizer) -> Tokenized | Problem:
    """Targets of one row: from the tokens of the whole text, else from the text tokenized in parts, else a Problem."""
    text, spans = layout.text, layout.spans
    if spans is None:
        found: _Marked | Span = _Marked(np.array(ids, np.int32), [])
    else:
        found = _by_bytes(ids, text, spans, tokenizer) or _by_offsets(text, spans, tokenizer) or _in_parts(text, spans, tokenizer)
    if isinstance(found, Span):
        return problem_at(conversation.row, _lossy(text[found.begin : found.end]))
    before, after = len(layout.before), len(layout.after)
    size = before + len(found.ids) + after
    tokens = np.empty(size, np.int32)
    tokens[:before], tokens[before : size - after], tokens[size - after :] = layout.before, found.ids, layout.after
    targets = np.full(size, spans is None)
    targets[:before], targets[size - after :] = True, True
    for begin, end in found.ranges:
        targets[before + begin : before + end] = True
    targets[:1] = False
    return Tokenized(conversation, tokens, targets)


def _by_bytes(ids: Sequence[int], text: str, spans: Sequence[Span], tokenizer: ChatTokenizer) -> _Marked | None:
    """The cheap proof: the tokens write the text byte for byte, and one ends at each border. None when that cannot be said."""
    written = text.encode()
    if tokenizer.spelling is None or not tokenizer.spelling.writes(ids, written):
        return None
    tokens = np.array(ids, np.int32)
    ends = tokenizer.spelling.ends(tokens)
    borders = [border for span in spans for border in (span.begin, span.stop, span.end)]
    if len(written) != len(text):
        borders = [len(text[:border].encode()) for border in borders]
    places = np.searchsorted(ends, borders)
    exact = (ends[places] == borders) | (np.array(borders) == 0)
    if not exact.all():
        return None
    counts = np.where(np.array(borders) == 0, 0, places + 1).tolist()
    for number, span in enumerate(spans):
        stop = counts[3 * number + 1]
        if span.last_id is not None and ids[stop - 1] != span.last_id:
            return None
    return _Marked(tokens, [(counts[at], counts[at + 2]) for at in range(0, len(counts), 3)])


def _by_offsets(text: str, spans: Sequence[Span], tokenizer: ChatTokenizer) -> _Marked | None:
    """For tokenizers that write something else than their tokens' bytes: places by offsets, proved by decoding."""
    pieces = tokenizer.encode([text])[0]
    ranges = []
    for span in spans:
        begin, stop, end = np.searchsorted(pieces.starts, (span.begin, span.stop, span.end)).tolist()
        if not _proved(pieces.ids, (begin, stop, end), text, span, tokenizer):
            return None
        ranges.append((begin, end))
    return _Marked(pieces.ids, ranges)


def _in_parts(text: str, spans: Sequence[Span], tokenizer: ChatTokenizer) -> "_Marked | Span":
    """The text cut at the borders of its spans and tokenized part by part; the first span that cannot be proved even so."""
    borders = [0, *(border for span in spans for border in (span.begin, span.stop, span.end)), len(text)]
    parts = tokenizer.encode_parts([text[a:b] for a, b in pairwise(borders)])
    ends = np.cumsum([len(part) for part in parts]).tolist()
    ids = np.concatenate([np.array(part, np.int32) for part in parts])
    for number, span in enumerate(spans):
        if not _proved(ids, (ends[3 * number], ends[3 * number + 1], ends[3 * number + 2]), text, span, tokenizer):
            return span
    return _Marked(ids, [(ends[3 * number], ends[3 * number + 2]) for number in range(len(spans))])


def _proved(ids: NDArray[np.int32], found: tuple[int, int, int], text: str, span: Span, tokenizer: ChatTokenizer) -> bool:
    """Whether the tokens in the range decode to the span's text, all of it and nothing else, with its end-of-turn token at its stop."""
    begin, stop, end = found
    wanted = text[span.begin : span.end]
    if begin >= end or (span.last_id is not None and int(ids[stop - 1]) != span.last_id):
        return False
    if tokenizer.decode(ids[begin:end]) == wanted:
        return True
    before, through = tokenizer.decode(ids[:begin]), tokenizer.decode(ids[:end])
    if not through.startswith(before):
        return False
    return through[len(before) :] == wanted or tokenizer.normalize(through[len(before) :]) == tokenizer.normalize(wanted)


def _lossy(text: str) -> Finding:
    message = "the tokenizer cannot write the answer: its tokens do not decode to the same text"
    return Finding("data.not-representable", message, hint="remove the row, or the characters that the model does not know", part=text)
