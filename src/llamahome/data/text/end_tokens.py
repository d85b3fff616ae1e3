"""The end tokens that are learned, what the user is told about them before training, and which setting gives a model an end token."""

import re
import shlex
from collections.abc import Iterable

from llamahome.data.rows.row_error import RowError
from llamahome.data.text.tokens import ChatTokenizer

_COMMON = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "<|eos|>"]
"""Common end tokens, those of turns first."""
_LIKE_AN_END = re.compile(r"(?i)(^|[^a-z])(end|eos|eot|eod|stop)([^a-z]|$)|</s>|endof")


def learned_ends(tokenizer: ChatTokenizer, *, chats: bool) -> tuple[int, ...]:
    """The ids of the learned end tokens: what the chat template writes after an answer, else end-of-text."""
    if chats and tokenizer.turn_end is not None:
        return (tokenizer.added_tokens[tokenizer.turn_end],)
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def notes_of(tokenizer: ChatTokenizer, *, chats: bool) -> tuple[str, ...]:
    """What the user should know about how rows are rendered and end, in sentences."""
    return (*(tokenizer.notes if chats else ()), *end_notes(tokenizer, chats=chats))


def end_notes(tokenizer: ChatTokenizer, *, chats: bool) -> tuple[str, ...]:
    """What the user should know about the end tokens before training; nothing if all files agree on one token."""
    ends, notes = learned_ends(tokenizer, chats=chats), []
    if not ends:
        if chats and _refuses(tokenizer):
            return ()  # each row reports why
        hint = end_setting(tokenizer) or "--set model.eos_token=TOKEN with a token of its vocabulary that no text contains"
        warning = "warning: no end is learned, because the tokenizer names no end token; the model will not stop by itself"
        return warning, f"help: {hint}"
    if not chats:
        return _left_out(tokenizer, ends[0], f"texts end in {_shown(tokenizer.eos_token, ends[0])}")
    if tokenizer.turn_end is None:
        if not _refuses(tokenizer):
            end = f"{tokenizer.eos_token} is put after the last one and learned as its end"
            notes = [f"the chat template writes no token after an answer: {end}"]
        return (*notes, *_left_out(tokenizer, ends[0], f"answers end in {_shown(tokenizer.eos_token, ends[0])}"))
    learned = f"answers end in {_shown(tokenizer.turn_end, ends[0])}, as the chat template writes it"
    if tokenizer.eos_token == tokenizer.turn_end:
        return _left_out(tokenizer, ends[0], learned)
    own = (
        "the tokenizer names no end token"
        if tokenizer.eos_id is None
        else f"the end token is {_shown(tokenizer.eos_token, tokenizer.eos_id)}"
    )
    if ends[0] in tokenizer.stop_ids:
        return (f"{learned}; {own}; generation_config.json names what is learned",)
    return (
        f"{learned}; {own}: final/generation_config.json will name {_list((*tokenizer.stop_ids, *ends))} as ends, and a tool that does not "
        f"read it has to be given the stop string {tokenizer.turn_end}",
    )


def end_setting(tokenizer: ChatTokenizer) -> str | None:
    """The setting that gives the tokenizer an end token; None if no token of its vocabulary looks like one."""
    named = [token for token, number in tokenizer.added_tokens.items() if number in tokenizer.stop_ids]
    special = [token for token in _COMMON if token in tokenizer.control_tokens]
    special += sorted(token for token in tokenizer.control_tokens if _LIKE_AN_END.search(token))
    for token in (tokenizer.turn_end, *named, *special):
        if token:
            return f"--set {shlex.quote(f'model.eos_token={token}')} puts it after every text or last answer"
    return None


def _left_out(tokenizer: ChatTokenizer, end: int, learned: str) -> tuple[str, ...]:
    if not tokenizer.stop_ids or end in tokenizer.stop_ids:
        return ()
    known = _list(tokenizer.stop_ids)
    return (f"{learned}, where the base's generation_config.json stops at {known} alone: final/generation_config.json will name {end} too",)


def _refuses(tokenizer: ChatTokenizer) -> bool:
    """Whether the template refuses the simplest chat."""
    try:
        tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except RowError:
        return True
    return False


def _shown(token: str | None, number: int) -> str:
    return f"{token} (id {number})"


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))
