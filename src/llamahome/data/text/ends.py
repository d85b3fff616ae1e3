"""The tokens that are learned as ends: which they are, what is said of them before training, and what else a model's files call an end."""

import re
import shlex
from collections.abc import Iterable

from llamahome.data.rows.fault import Finding
from llamahome.data.text.tokens import ChatTokenizer

_USUAL = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "<|eos|>")
"""Names of end tokens in use, those of turns first."""
_LIKE_AN_END = re.compile(r"(?i)(^|[^a-z])(end|eos|eot|eod|stop)([^a-z]|$)|</s>|endof")


def learned_ends(tokenizer: ChatTokenizer, *, chats: bool) -> tuple[int, ...]:
    """Ids of the tokens with which rows end that are learned: what the chat template writes after an answer, else end-of-text."""
    if chats and tokenizer.turn_end is not None:
        return (tokenizer.added_tokens[tokenizer.turn_end],)
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def notes_of(tokenizer: ChatTokenizer, *, chats: bool) -> tuple[str, ...]:
    """What should be known of how rows are written and end, in sentences."""
    return (*(tokenizer.notes if chats else ()), *end_notes(tokenizer, chats=chats))


def end_notes(tokenizer: ChatTokenizer, *, chats: bool) -> tuple[str, ...]:
    """What should be known of the ends of such rows before training; nothing where all agree on one token."""
    ends, told = learned_ends(tokenizer, chats=chats), []
    if not ends:
        if chats and _refuses(tokenizer):
            return ()  # the rows say why
        mend = end_setting(tokenizer) or "--set model.eos_token=TOKEN with a token of its vocabulary that no text contains"
        return ("warning: no end is learned, because the tokenizer names no end token; the model will not stop by itself", f"help: {mend}")
    if not chats:
        return _left_out(tokenizer, ends[0], f"texts end in {_shown(tokenizer.eos_token, ends[0])}")
    if tokenizer.turn_end is None:
        if not _refuses(tokenizer):
            told = [
                f"the chat template writes no token after an answer: {tokenizer.eos_token} is put after the last one and learned as its end"
            ]
        return (*told, *_left_out(tokenizer, ends[0], f"answers end in {_shown(tokenizer.eos_token, ends[0])}"))
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
    """The setting with which a tokenizer without an end token gets one; None when no token of its vocabulary looks like an end."""
    named = [token for token, number in tokenizer.added_tokens.items() if number in tokenizer.stop_ids]
    special = [token for token in _USUAL if token in tokenizer.control_tokens]
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
    """Whether nothing can be said of the template, because it refuses the plainest chat."""
    try:
        tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except Finding:
        return True
    return False


def _shown(token: str | None, number: int) -> str:
    return f"{token} (id {number})"


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))
