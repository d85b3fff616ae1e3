"""A conversation as text, and which spans of it are targets; a row is rendered once if the skeleton of such chats is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from llamahome.data.records import Conversation
from llamahome.data.rows.rendered import turn_mark
from llamahome.data.rows.row_error import RowError
from llamahome.data.rows.toolcalls import shown_definitions, texts_of
from llamahome.data.text.spans import OTHER_TEMPLATE, Span, check_shown, find_span, marked_spans
from llamahome.data.text.template import with_remedy
from llamahome.data.text.template_skeleton import find_skeleton
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.data.text.unrendered import turns_of
from llamahome.rundir import as_typed

TrainOn = Literal["assistant", "all", "last", "judged"]
"""data.train_on, or `judged`: the answers of a pair or of a labelled row, for which data.train_on is not read."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text with its target spans; `before` and `after` are ids that are put around its tokens."""

    text: str
    spans: tuple[Span, ...] | None
    """None: every token is a target."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def render(conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: TrainOn) -> Rendered:
    """Render one conversation; raises RowError if its target spans cannot be determined for certain."""
    if conversation.text is not None:
        return _plain(conversation.text, tokenizer)
    try:
        return _chat(conversation, tokenizer, train_on=train_on)
    except RowError as error:
        if train_on == "judged" and error.code == "data.mask-unproved":
            raise RowError(error.code, error.message, hint=OTHER_TEMPLATE, part=error.part) from error
        raise with_remedy(error, conversation.turns, tokenizer.template) from error


def _chat(conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: TrainOn) -> Rendered:
    _refuse_control_tokens(conversation, tokenizer)
    turns = conversation.turns
    if train_on == "all":
        return _everything(conversation, tokenizer)
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number not in conversation.context_only]
    if not answers:
        return _prompt(conversation, tokenizer)
    text, spans = _answers(conversation, answers[-1:] if train_on == "last" else answers, tokenizer)
    if answers[-1] == len(turns) - 1 and spans[-1].last_id is None:
        return Rendered(text[: spans[-1].end], tuple(spans), after=_end_of_text(tokenizer))
    return Rendered(text, tuple(spans))


def _prompt(conversation: Conversation, tokenizer: ChatTokenizer) -> Rendered:
    """The chat up to an answer that is not there; an end token stands for it, so that a row ends its prompt where others do."""
    chat_text = tokenizer.render(conversation.turns, tools=conversation.tools, add_generation_prompt=True)
    _check_context(conversation, chat_text)
    return Rendered(chat_text, (), after=tokenizer.all_ends[:1])


def _answers(conversation: Conversation, numbers: Sequence[int], tokenizer: ChatTokenizer) -> tuple[str, list[Span]]:
    """The chat as text, and the spans of these answers in it."""
    turns, tools = conversation.turns, conversation.tools
    if tokenizer.template.has_marks:
        chat_text, marks = tokenizer.template.render_marked(turns, tools=tools)
        spans = marked_spans(turns, numbers, chat_text, marks, tokenizer)
    else:
        chat_text = tokenizer.render(turns, tools=tools)
        skeleton = None if tools else find_skeleton(turns, tokenizer)
        spans_of_skeleton = skeleton.spans(turns, numbers, chat_text) if skeleton is not None else None
        if spans_of_skeleton is not None:
            return chat_text, spans_of_skeleton
        spans = [find_span(turns, number, chat_text, tokenizer, tools=tools) for number in numbers]
    _check_context(conversation, chat_text)
    return chat_text, spans


def _everything(conversation: Conversation, tokenizer: ChatTokenizer) -> Rendered:
    """The chat with every token as a target; an end token is added if the template writes none."""
    chat_text = tokenizer.render(conversation.turns, tools=conversation.tools)
    _check_context(conversation, chat_text)
    last = conversation.turns[-1]
    content = last.get("content", "").rstrip()
    if last["role"] == "assistant" and content and chat_text.rstrip().endswith(content):
        return Rendered(chat_text.rstrip(), None, after=_end_of_text(tokenizer))
    return Rendered(chat_text, None)


def _check_context(conversation: Conversation, chat_text: str) -> None:
    check_shown(conversation.turns, chat_text)
    missing = shown_definitions(conversation.tools, chat_text)
    if missing is not None:
        message = f"the model's chat template leaves out the definition of the tool {missing}"
        raise RowError("data.turn-left-out", message, hint="remove the tools from the row")


def _plain(text: str, tokenizer: ChatTokenizer) -> Rendered:
    begins = tokenizer.adds_bos and not text.startswith(tokenizer.bos_token or "\0")
    ends = tokenizer.eos_id is not None and not text.rstrip().endswith(tokenizer.eos_token or "\0")
    before = (tokenizer.bos_id,) if begins and tokenizer.bos_id is not None else ()
    return Rendered(text, None, before, _end_of_text(tokenizer) if ends else ())


def _end_of_text(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def _refuse_control_tokens(conversation: Conversation, tokenizer: ChatTokenizer) -> None:
    """Raise RowError if a text contains a special token, which the model would read as part of the template."""
    for number, turn in enumerate(conversation.turns):
        control = tokenizer.control_token_in(turn.get("content", ""))
        if control is not None:
            if (mark := turn_mark(turn["content"])) is not None:
                message = f"turn {number} ({turn['role']}) is a chat that was rendered already: it begins with {mark}"
                hint = _read_back_hint(conversation.row.source, turn["content"], tokenizer)
                raise RowError("data.rendered-chat", message, hint=hint, part=turn["content"])
            at = turn["content"].index(control)
            raise _control_token(f"turn {number} ({turn['role']})", control, part=turn["content"][max(0, at - 40) :])
        if turn.keys() > {"role", "content"} or "content" not in turn:
            _refuse_within({key: part for key, part in turn.items() if key != "content"}, f"turn {number} ({turn['role']})", tokenizer)
    for number, tool in enumerate(conversation.tools):
        _refuse_within(tool, f"tools[{number}]", tokenizer)


def _read_back_hint(source: str, text: str, tokenizer: ChatTokenizer) -> str:
    """What mends a rendered question: the command that reads its turns back, if this template rendered them."""
    by_hand = "write its turns into a list `messages`, without the marks of a template"
    if turns_of(text, tokenizer) is None:
        return by_hand
    copy = next(name for number in count(1) if not (name := Path("clean.jsonl" if number == 1 else f"clean-{number}.jsonl")).exists())
    return f"llamahome data check {as_typed(Path(source))} --fix {copy}   writes a copy with the turns of such questions as lists"


def _refuse_within(value: Any, what: str, tokenizer: ChatTokenizer) -> None:
    for text in texts_of(value):
        control = tokenizer.control_token_in(text)
        if control is not None:
            raise _control_token(what, control, part=text)


def _control_token(what: str, control: str, *, part: str) -> RowError:
    return RowError(
        "data.control-token-in-text",
        f"{what} contains {control}, which the model reads as a control token",
        hint=f'write it differently, like "{control[0]} {control[1:]}", or remove the row',
        part=part,
    )
