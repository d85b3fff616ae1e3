"""Conversations to examples: the tokens of each row and which of them are targets, verified against the rendered text.

A chat is rendered once and tokenized as one text; render.py gives the spans of its answers. The bytes of the tokens must be exactly that
text, and a token must end at each border of an answer. Otherwise the answers are decoded and compared, if necessary after the text was
tokenized in parts. A row that cannot be verified either way is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llamahome.data.records import Conversation, Example
from llamahome.data.rows.row_error import RowError, problem_at
from llamahome.data.text.render import Rendered, TrainOn, render
from llamahome.data.text.spans import Span
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import Problem

OnOverlong = Literal["truncate", "drop", "split", "error"]


@dataclass(frozen=True)
class Tokenized:
    """A conversation in tokens, before max_length is applied."""

    conversation: Conversation
    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]


@dataclass(frozen=True)
class _TargetRanges:
    """The tokens of a text, and the ranges of tokens that are targets."""

    ids: NDArray[np.int32]
    ranges: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """The examples of one row (none if it was dropped), and its size before anything was cut."""

    examples: tuple[Example, ...]
    num_tokens: int
    num_targets: int
    outcome: Literal["whole", "truncated", "dropped", "split"]
    lost: tuple[tuple[int, int], ...] = ()
    """Targets that were cut, as (length, count): a max_length of `length`, a multiple of 64, would keep `count` of them. The first token of
    each part of a split row is not counted, because no token predicts it."""
    longest: int = 0
    """Tokens of the longer answer of a pair with its prompt; 0 if the row is no pair."""

    @property
    def needed(self) -> int:
        """The max_length that keeps all of the row: it holds for each answer of a pair with its prompt."""
        return self.longest or self.num_tokens


def encode(
    conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: TrainOn, max_length: int, on_overlong: OnOverlong
) -> list[Encoded | Problem]:
    """The examples of a batch of conversations, in order, each at most `max_length` tokens long."""
    return [
        item if isinstance(item, Problem) else fit(item, max_length=max_length, on_overlong=on_overlong)
        for item in tokenize(conversations, tokenizer, train_on=train_on)
    ]


def tokenize(conversations: Sequence[Conversation], tokenizer: ChatTokenizer, *, train_on: TrainOn) -> list[Tokenized | Problem]:
    """Tokens and targets of conversations, before max_length is applied."""
    rendered: list[Rendered | Problem] = []
    for conversation in conversations:
        try:
            rendered.append(render(conversation, tokenizer, train_on=train_on))
        except RowError as finding:
            rendered.append(problem_at(conversation.row, finding))
    ids = iter(tokenizer.encode_ids([item.text for item in rendered if isinstance(item, Rendered)]))
    return [
        item if isinstance(item, Problem) else _mark_targets(conversation, item, next(ids), tokenizer)
        for conversation, item in zip(conversations, rendered, strict=True)
    ]


def fit(tokenized: Tokenized, *, max_length: int, on_overlong: OnOverlong) -> Encoded | Problem:
    """Apply max_length: cut the end, drop the row, split it (plain text only), or refuse it."""
    count, targets = len(tokenized.tokens), int(tokenized.targets.sum())
    if count <= max_length:
        row = tokenized.conversation.row
        example = Example(row.source, row.index, row.line, tokenized.tokens, tokenized.targets, good=tokenized.conversation.good)
        return Encoded((example,), count, targets, "whole")
    if on_overlong == "drop":
        return Encoded((), count, targets, "dropped", ((_rounded(count), targets),) if targets else ())
    if on_overlong == "truncate":
        lost = np.flatnonzero(tokenized.targets[max_length:]) + max_length + 1
        kept = _example(tokenized, 0, max_length, cut=count - max_length, cut_targets=len(lost))
        lengths, counts = np.unique(_rounded(lost), return_counts=True)
        return Encoded((kept,), count, targets, "truncated", tuple(zip(lengths.tolist(), counts.tolist(), strict=True)))
    if on_overlong == "split" and tokenized.conversation.text is not None:
        begins = range(0, count, max_length)
        examples = tuple(_example(tokenized, at, min(at + max_length, count)) for at in begins)
        return Encoded(examples, count, targets, "split")
    message = f"{count:,} tokens, more than data.max_length {max_length:,}"
    if on_overlong == "split":
        message += "; a chat cannot be split"
    hint = f"--set data.max_length={count}"
    return problem_at(tokenized.conversation.row, RowError("data.overlong", message, hint=hint))


def _rounded(length: Any) -> Any:
    """Round up to a multiple of 64."""
    return -(-length // 64) * 64


def _example(tokenized: Tokenized, begin: int, end: int, *, cut: int = 0, cut_targets: int = 0) -> Example:
    row, good = tokenized.conversation.row, tokenized.conversation.good
    targets = tokenized.targets[begin:end].copy()
    targets[:1] = False
    return Example(row.source, row.index, row.line, tokenized.tokens[begin:end], targets, cut, cut_targets, good=good)


def _mark_targets(conversation: Conversation, rendered: Rendered, ids: Sequence[int], tokenizer: ChatTokenizer) -> Tokenized | Problem:
    """The targets of one row, found by the first of three methods that can verify them, or a Problem."""
    text, spans = rendered.text, rendered.spans
    if spans is None:
        result: _TargetRanges | Span = _TargetRanges(np.array(ids, np.int32), [])
    else:
        result = _by_bytes(ids, text, spans, tokenizer) or _by_offsets(text, spans, tokenizer) or _in_parts(text, spans, tokenizer)
    if isinstance(result, Span):
        return problem_at(conversation.row, _lossy(text[result.begin : result.end]))
    before, after = len(rendered.before), len(rendered.after)
    size = before + len(result.ids) + after
    tokens = np.empty(size, np.int32)
    tokens[:before], tokens[before : size - after], tokens[size - after :] = rendered.before, result.ids, rendered.after
    targets = np.full(size, spans is None)
    targets[:before], targets[size - after :] = True, True
    for begin, end in result.ranges:
        targets[before + begin : before + end] = True
    targets[:1] = False
    return Tokenized(conversation, tokens, targets)


def _by_bytes(ids: Sequence[int], text: str, spans: Sequence[Span], tokenizer: ChatTokenizer) -> _TargetRanges | None:
    """The fast method: the bytes of the tokens are the text, and a token ends at each border. None if this is not so."""
    encoded = text.encode()
    if tokenizer.token_bytes is None or not tokenizer.token_bytes.equal(ids, encoded):
        return None
    tokens = np.array(ids, np.int32)
    ends = tokenizer.token_bytes.ends(tokens)
    borders = [border for span in spans for border in (span.begin, span.stop, span.end)]
    if len(encoded) != len(text):
        borders = [len(text[:border].encode()) for border in borders]
    at = np.searchsorted(ends, borders)
    exact = (ends[at] == borders) | (np.array(borders) == 0)
    if not exact.all():
        return None
    counts = np.where(np.array(borders) == 0, 0, at + 1).tolist()
    for number, span in enumerate(spans):
        stop = counts[3 * number + 1]
        if span.last_id is not None and ids[stop - 1] != span.last_id:
            return None
    return _TargetRanges(tokens, [(counts[i], counts[i + 2]) for i in range(0, len(counts), 3)])


def _by_offsets(text: str, spans: Sequence[Span], tokenizer: ChatTokenizer) -> _TargetRanges | None:
    """For tokenizers whose tokens have no bytes of their own: borders from offsets, verified by decoding."""
    pieces = tokenizer.encode([text])[0]
    ranges = []
    for span in spans:
        begin, stop, end = np.searchsorted(pieces.starts, (span.begin, span.stop, span.end)).tolist()
        if not _verified(pieces.ids, (begin, stop, end), text, span, tokenizer):
            return None
        ranges.append((begin, end))
    return _TargetRanges(pieces.ids, ranges)


def _in_parts(text: str, spans: Sequence[Span], tokenizer: ChatTokenizer) -> "_TargetRanges | Span":
    """Tokenize the text in parts, cut at the borders of its spans. Returns the first span that cannot be verified even so."""
    borders = [0, *(border for span in spans for border in (span.begin, span.stop, span.end)), len(text)]
    parts = tokenizer.encode_parts([text[a:b] for a, b in pairwise(borders)])
    ends = np.cumsum([len(part) for part in parts]).tolist()
    ids = np.concatenate([np.array(part, np.int32) for part in parts])
    for number, span in enumerate(spans):
        if not _verified(ids, (ends[3 * number], ends[3 * number + 1], ends[3 * number + 2]), text, span, tokenizer):
            return span
    return _TargetRanges(ids, [(ends[3 * number], ends[3 * number + 2]) for number in range(len(spans))])


def _verified(ids: NDArray[np.int32], borders: tuple[int, int, int], text: str, span: Span, tokenizer: ChatTokenizer) -> bool:
    """Whether the tokens from begin to end decode to exactly the text of the span, with its end-of-turn token before stop."""
    begin, stop, end = borders
    expected = text[span.begin : span.end]
    if begin >= end or (span.last_id is not None and int(ids[stop - 1]) != span.last_id):
        return False
    if tokenizer.decode(ids[begin:end]) == expected:
        return True
    before, through = tokenizer.decode(ids[:begin]), tokenizer.decode(ids[:end])
    if not through.startswith(before):
        return False
    return through[len(before) :] == expected or tokenizer.normalize(through[len(before) :]) == tokenizer.normalize(expected)


def _lossy(text: str) -> RowError:
    message = "the tokenizer cannot write the answer: its tokens do not decode to the same text"
    return RowError("data.not-representable", message, hint="remove the row, or the characters that the model does not know", part=text)
