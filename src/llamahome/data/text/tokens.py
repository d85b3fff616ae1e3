"""The model's own tokenizer and chat template: the text of a chat as the model expects it, and its tokens with their offsets.

The only file of data/ that imports transformers. No code from a model folder is ever run; templates run in a bounded sandbox.
A beginning-of-text token is never added to a rendered chat, because a template that needs one writes it.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from llamahome.data.rows.row_error import RowError
from llamahome.data.text.bounded_jinja import bounded_compiler
from llamahome.data.text.new_tokens import NewToken, add_new_tokens
from llamahome.data.text.template import TEMPLATE_DATE, ChatTemplate, with_remedy, with_system_role
from llamahome.data.text.token_bytes import TokenBytes, read_token_bytes
from llamahome.data.text.tokenizer_files import (
    SystemRole,
    TokenizerSource,
    check_template,
    no_chat_template,
    read_stops,
    read_template,
    set_eos,
    why_no_tokenizer,
)
from llamahome.errors import ConfigError, DataError, Problem

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizer classes that tokenizer.json describes completely; AutoTokenizer, which imports torch, opens the others."""

_CACHED_WORDS = 1 << 17
"""Size of the tokenizer's cache of words; the default of 10,000 is soon full. Measured on the sample: a seventh faster, for some 20 MB."""
_ANCHORS = ("\n", "a", ";")  # put before a part of a text so that it is not at the beginning; the first that does not merge is used


@dataclass(frozen=True)
class TokenPieces:
    """The tokens of one text: ids int32 [n], and starts int64 [n], the character at which each token begins."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]


class ChatTokenizer:
    """A fast tokenizer with its chat template."""

    def __init__(
        self, tokenizer: Any, *, system_role: SystemRole = "auto", stop_ids: Sequence[int] = (), new: Sequence[NewToken] = ()
    ) -> None:
        self._tokenizer, self.new_tokens = tokenizer, tuple(new)
        self.system_role: SystemRole = system_role
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        if hasattr(self._backend.model, "_resize_cache"):
            self._backend.model._resize_cache(_CACHED_WORDS)
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self.added_tokens: dict[str, int] = added
        """Ids of the tokens that are matched in a text before all others, by their text."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {""}
        self.control_tokens: frozenset[str] = frozenset(special)
        """Special tokens; a text of a chat must not contain one."""
        self.eos_token: str | None = tokenizer.eos_token
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos_token: str | None = tokenizer.bos_token
        self.bos_id: int | None = tokenizer.bos_token_id
        self.pad_id: int | None = tokenizer.pad_token_id
        self.stop_ids = tuple(number for number in stop_ids if 0 <= number < len(tokenizer))
        """End tokens that the model's files name, without ids that the tokenizer does not have."""
        self.skeletons: dict[Any, Any] = {}
        """The skeletons that data/text/template_skeleton.py has found so far."""
        self._control = _any_of(special)
        self._added_lengths = sorted({len(text) for text in added if text}, reverse=True)
        self._added = _any_of(added)

    @property
    def chat_template(self) -> str | None:
        """The text of the template; None if the model has none."""
        template = self._tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a beginning-of-text token before plain text."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        return self.bos_id is not None and ids[0] == self.bos_id

    @cached_property
    def turn_end(self) -> str | None:
        """The token that the template writes after an assistant turn; None if it writes none."""
        if self.chat_template is None:
            return None
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "zebra"}])
        except RowError:
            return None
        return self.added_token_at(text.rpartition("zebra")[2].lstrip())

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens at which an answer ends: the one that the template writes after an assistant turn, and end-of-text."""
        ids = [] if self.turn_end is None else [self.added_tokens[self.turn_end]]
        return tuple(ids) if self.eos_id is None or self.eos_id in ids else (*ids, self.eos_id)

    @property
    def all_ends(self) -> tuple[int, ...]:
        """Tokens at which generation stops: `end_ids` and `stop_ids`."""
        return tuple(dict.fromkeys((*self.end_ids, *self.stop_ids)))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, by its text in the vocabulary."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @cached_property
    def token_bytes(self) -> TokenBytes | None:
        """The bytes of every token; None if the type of tokenizer is not supported."""
        return read_token_bytes(self._backend)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which tokens a chat becomes."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        digest.update(json.dumps([self._tokenizer.chat_template, self._tokenizer.special_tokens_map, str(TEMPLATE_DATE)]).encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, str]:
        """Names and contents of files from which load_tokenizer makes the same tokenizer in another process, without importing torch."""
        template = self._tokenizer.chat_template
        named = [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else template
        settings = {"tokenizer_class": _GENERIC[1], "chat_template": named, **self._tokenizer.special_tokens_map}
        return {"tokenizer.json": self._backend.to_str(), "tokenizer_config.json": json.dumps(settings)}

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, ready to render; raises DataError if the model has none."""
        require_chat_template(self, what="a chat is to be rendered")
        plain, with_tools = self._tokenizer.get_chat_template(), self._tokenizer.get_chat_template(tools=[{}])
        variables = dict(self._tokenizer.special_tokens_map)
        template = ChatTemplate(plain, with_tools, compiler=bounded_compiler(_compile_jinja_template), variables=variables)
        return with_system_role(template, self.system_role)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how chats are rendered."""
        date = f"{TEMPLATE_DATE:%d %B %Y}"
        shown = f"the chat template shows the date: every row is written as on {date}, today's date is used in a chat alone"
        return (shown,) if self.template.shows_date else ()

    def render(self, turns: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False) -> str:
        """Render the chat for training; raises RowError if the template refuses it."""
        return self.template.render(turns, tools=tools, prompt=add_generation_prompt, date=TEMPLATE_DATE)

    def encode(self, texts: Sequence[str]) -> list[TokenPieces]:
        """The tokens of each text, without special tokens; a batch is tokenized on all processors."""
        return [
            TokenPieces(np.array(encoding.ids, np.int32), np.array([start for start, _ in encoding.offsets], np.int64))
            for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Only the token ids of each text, without special tokens; the fastest way."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """The ids of each part of one text: no token spans two parts, and no space is put before any part but the first."""
        ids = self.encode_ids(parts)
        if not self._adds_space:
            return ids
        for number in range(1, len(parts)):
            for anchor in _ANCHORS:
                alone, together = self.encode_ids([anchor, anchor + parts[number]])
                if together[: len(alone)] == alone:
                    ids[number] = together[len(alone) :]
                    break
        return ids

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before every text, as SentencePiece does."""
        return self.token_bytes is None or not self.token_bytes.equal(self.encode_ids(["a"])[0], b"a")

    def encode_prompt(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        """The chat so far and the beginning of the next answer, rendered with today's date. Raises DataError."""
        require_chat_template(self, what="this is a chat")
        try:
            text = self.template.render(turns, tools=(), prompt=True, date=datetime.date.today())
            if turns[0]["role"] == "system" and turns[0]["content"].strip() not in text:
                raise RowError("data.turn-left-out", "the model's chat template leaves out the system message")
        except RowError as finding:
            error = with_remedy(finding, turns, self.template)
            raise DataError(Problem(code=error.code, message=error.message, hint=error.hint)) from finding
        return [int(number) for number in self.encode([text])[0].ids]

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """The exact text of the tokens, including special tokens."""
        return str(self._backend.decode([int(number) for number in ids], skip_special_tokens=False))

    def decode_plain(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """The text of the tokens without special tokens, for people."""
        return str(self._backend.decode([int(number) for number in ids], skip_special_tokens=True))

    def normalize(self, text: str) -> str:
        """The text after the tokenizer's normalizer, for example in Unicode NFC."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def control_token_in(self, text: str) -> str | None:
        """The first special token in the text."""
        match = self._control.search(text)
        return match[0] if match else None

    def added_token_at(self, text: str) -> str | None:
        """The added token with which the text begins."""
        match = self._added.match(text)
        return match[0] if match else None

    def added_token_before(self, text: str) -> str | None:
        """The added token with which the text ends."""
        return next((text[-length:] for length in self._added_lengths if text[-length:] in self.added_tokens), None)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; joined, they are the text of all. A character that spans several tokens belongs to the last of them."""
        texts: list[str] = []
        window, done = 0, 0
        for number in range(len(ids)):
            before, after = self.decode(ids[window:done]), self.decode(ids[window : number + 1])
            unfinished = after.endswith("\ufffd") and number + 1 < len(ids) and number - done < 3
            texts.append("" if unfinished else after[len(before) :])
            if not unfinished:
                window, done = done, number + 1
        return texts


def load_tokenizer(
    folder: str | Path, *, chat_template: str | None = None, eos_token: str | None = None, system_role: SystemRole = "auto"
) -> ChatTokenizer:
    """`open_tokenizer` without new tokens."""
    return open_tokenizer(TokenizerSource(str(folder), chat_template, eos_token, system_role))


def open_tokenizer(source: TokenizerSource) -> ChatTokenizer:
    """The tokenizer of a model folder, with its own chat template and end token or the given ones, and with new tokens.

    Raises ConfigError if the folder has no fast tokenizer, the template is not valid Jinja, or the vocabulary lacks the end token.
    """
    folder, chat_template, eos_token, system_role, new = TokenizerSource(*source)
    place = Path(folder)
    template = read_template(chat_template) if chat_template is not None else None
    try:
        tokenizer = _open(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(why_no_tokenizer(place, error)) from error
    if not tokenizer.is_fast:
        raise ConfigError(why_no_tokenizer(place, None, slow=type(tokenizer).__name__))
    if template is not None:
        tokenizer.chat_template = template
    added = add_new_tokens(tokenizer, [AddedToken(token, normalized=False, special=False) for token in new]) if new else ()
    if eos_token is not None:
        set_eos(tokenizer, eos_token)
    wrapped = ChatTokenizer(tokenizer, system_role=system_role, stop_ids=read_stops(place), new=added)
    if wrapped.chat_template is not None:
        check_template(wrapped.render, chat_template or str(place))
    return wrapped


def require_chat_template(tokenizer: ChatTokenizer, *, what: str) -> None:
    """Raise DataError if the model has no chat template; `what` says why one is needed."""
    if tokenizer.chat_template is None:
        names = sorted(tokenizer._tokenizer.chat_template or ())
        raise DataError(no_chat_template(what, names))


def _open(place: Path) -> Any:
    settings = place / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if known.get("tokenizer_class") in _GENERIC and (place / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True)
    if not place.is_dir():
        raise FileNotFoundError("there is no such folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def _any_of(words: Any) -> re.Pattern[str]:
    ordered = sorted((word for word in words if word), key=lambda word: (-len(word), word))
    return re.compile("|".join(re.escape(word) for word in ordered) or r"(?!)")
