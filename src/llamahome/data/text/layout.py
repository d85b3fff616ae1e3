"""A conversation as text, and which stretches of it are learned; one rendering per row where the frame of such chats is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamahome.data.records import Conversation
from llamahome.data.rows.fault import Finding
from llamahome.data.rows.toolcalls import shown_definitions, texts_of
from llamahome.data.text.frames import find_frame
from llamahome.data.text.spans import Span, check_shown, find_span, marked_spans
from llamahome.data.text.system import way_out
from llamahome.data.text.tokens import ChatTokenizer

TrainOn = Literal["assistant", "all", "last"]


@dataclass(frozen=True)
class Layout:
    """A conversation as text with its learned stretches; `before` and `after` are ids put around its tokens."""

    text: str
    spans: tuple[Span, ...] | None
    """None: every token is learned."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def lay_out(conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: TrainOn) -> Layout:
    """The layout of one conversation; raises Finding when it cannot be shown what would be learned of it."""
    if conversation.text is not None:
        return _plain(conversation.text, tokenizer)
    try:
        return _chat(conversation, tokenizer, train_on=train_on)
    except Finding as finding:
        raise way_out(finding, conversation.turns, tokenizer.template) from finding


def _chat(conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: TrainOn) -> Layout:
    _refuse_control_tokens(conversation, tokenizer)
    turns = conversation.turns
    if train_on == "all":
        return _everything(conversation, tokenizer)
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number not in conversation.context_only]
    whole, spans = _answers(conversation, answers[-1:] if train_on == "last" else answers, tokenizer)
    if answers[-1] == len(turns) - 1 and spans[-1].last_id is None:
        return Layout(whole[: spans[-1].end], tuple(spans), after=_end_of_text(tokenizer))
    return Layout(whole, tuple(spans))


def _answers(conversation: Conversation, numbers: Sequence[int], tokenizer: ChatTokenizer) -> tuple[str, list[Span]]:
    """The chat as text, and where these answers lie in it."""
    turns, tools = conversation.turns, conversation.tools
    if tokenizer.template.has_marks:
        whole, marks = tokenizer.template.render_marked(turns, tools=tools)
        spans = marked_spans(turns, numbers, whole, marks, tokenizer)
    else:
        whole = tokenizer.render(turns, tools=tools)
        frame = None if tools else find_frame(turns, tokenizer)
        framed = frame.spans(turns, numbers, whole) if frame is not None else None
        if framed is not None:
            return whole, framed
        spans = [find_span(turns, number, whole, tokenizer, tools=tools) for number in numbers]
    _check_context(conversation, whole)
    return whole, spans


def _everything(conversation: Conversation, tokenizer: ChatTokenizer) -> Layout:
    """All of the chat, with an end where the template writes none."""
    whole = tokenizer.render(conversation.turns, tools=conversation.tools)
    _check_context(conversation, whole)
    last = conversation.turns[-1]
    content = last.get("content", "").rstrip()
    if last["role"] == "assistant" and content and whole.rstrip().endswith(content):
        return Layout(whole.rstrip(), None, after=_end_of_text(tokenizer))
    return Layout(whole, None)


def _check_context(conversation: Conversation, whole: str) -> None:
    check_shown(conversation.turns, whole)
    missing = shown_definitions(conversation.tools, whole)
    if missing is not None:
        message = f"the model's chat template leaves out the definition of the tool {missing}"
        hint = "remove the tools, or --set model.chat_template=FILE.jinja with a template that writes them"
        raise Finding("data.turn-left-out", message, hint=hint)


def _plain(text: str, tokenizer: ChatTokenizer) -> Layout:
    begins = tokenizer.adds_bos and not text.startswith(tokenizer.bos_token or "\0")
    ends = tokenizer.eos_id is not None and not text.endswith(tokenizer.eos_token or "\0")
    before = (tokenizer.bos_id,) if begins and tokenizer.bos_id is not None else ()
    return Layout(text, None, before, _end_of_text(tokenizer) if ends else ())


def _end_of_text(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def _refuse_control_tokens(conversation: Conversation, tokenizer: ChatTokenizer) -> None:
    """Finding when a text would be read as a sign of the template's own."""
    for number, turn in enumerate(conversation.turns):
        control = tokenizer.control_token_in(turn.get("content", ""))
        if control is not None:
            at = turn["content"].index(control)
            raise _control_token(f"turn {number} ({turn['role']})", control, part=turn["content"][max(0, at - 40) :])
        if turn.keys() > {"role", "content"} or "content" not in turn:
            _refuse_within({key: part for key, part in turn.items() if key != "content"}, f"turn {number} ({turn['role']})", tokenizer)
    for number, tool in enumerate(conversation.tools):
        _refuse_within(tool, f"tools[{number}]", tokenizer)


def _refuse_within(value: Any, what: str, tokenizer: ChatTokenizer) -> None:
    for text in texts_of(value):
        control = tokenizer.control_token_in(text)
        if control is not None:
            raise _control_token(what, control, part=text)


def _control_token(what: str, control: str, *, part: str) -> Finding:
    return Finding(
        "data.control-token-in-text",
        f"{what} contains {control}, which the model reads as a control token",
        hint=f'write it differently, like "{control[0]} {control[1:]}", or remove the row',
        part=part,
    )
