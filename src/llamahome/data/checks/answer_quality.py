"""Answers that teach the wrong thing: empty, boilerplate, cut in the middle, or in a language that few rows are in.

The rules look at whole answers and at their beginnings and ends, so that they ignore an answer that quotes such words. They rather miss a
weak answer than report a good one. Whether an answer that simply stops was cut depends on the other rows: `end_class` gives its class.

Languages need the extra `quality` (py3langid). Short and doubtful texts have no language here. Measured on 5,594 docstrings of Python's
library: 3,787 are clear, all of them English; 15,000 rows a second.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from llamahome.data.checks.findings import Found, RowLocation
from llamahome.data.files.jsonrow import excerpt
from llamahome.data.records import Conversation
from llamahome.data.text.targets import Tokenized
from llamahome.errors import Problem

_CLOSED, _OPEN = 1, 2
_PROSE_WORDS = 20
"""An answer of so many words is prose that ends in a punctuation mark; shorter ones may be labels, titles or names."""

_THOUGHTS = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.S)
_NO_WORD = re.compile(r"[\s.…\-–—_*#'\"`\u200b-\u200f\u2060\ufeff]*\Z")
_CANNOT = r"i(?:'m| am) (?:unable|not able) to|i (?:can't|cannot|can not|could not|couldn't|won't|will not)"
_REQUEST = r"(?:fulfil|fulfill|comply with|assist with|assist you|help with|help you with|complete) (?:this|that|your|the|such|with)\b"
_BOILERPLATE = re.compile(
    r"(?:(?:i(?:'m| am) )?(?:very |so |truly )?(?:sorry|apologi[sz]e)[,.]?(?: but)? |unfortunately, )?"
    r"(?:as an? (?:ai|artificial intelligence|(?:large )?language model)(?: language)?(?: model| assistant| chatbot)?\s*[,.;:(]"
    r"|as an? (?:ai|artificial intelligence|large language model|language model)(?: language)?(?: model| assistant)?,? i\b"
    rf"|(?:{_CANNOT}) {_REQUEST})"
    r"|lorem ipsum\b"
)
_FIRST_LETTERS = frozenset("ivstaulfnpIVSTAULFNP")
_SUSPECT = re.compile(r"i['’\s]|(?:very|so|truly|as|lorem|to)\s|sorry|apolog|unfort|todo|tbd|fixme|n/a|nan|placeh", re.IGNORECASE)
"""The letters and words with which `_BOILERPLATE` and `_STUB` can begin."""
_NAME = r"(?:[a-z]+[ _.])*(?:answer|response|completion|output|reply|assistant|solution)(?:[ _.][a-z0-9]+)*"
_TEMPLATE_FIELD = re.compile(
    rf"\$?\{{{{?\s*{_NAME}\s*\}}}}?|%\({_NAME}\)s|<(?:answer|response|completion)>"
    rf"|[<\[](?:insert|enter|add|write|put|your)\b[ _][^<>\[\]\n]{{0,60}}[>\]]"
)
_STUB = re.compile(r"(?:todo|tbd|fixme|#?n/a|nan|<na>|#(?:value|ref|name)|placeholder|to be (?:done|added|written|filled in))[.!:]?")
_JSON_START = re.compile(r"""\{\s*"[^"\n]{1,80}"\s*:|\[\s*\{\s*"[^"\n]{1,80}"\s*:""")
_NUMBERED = re.compile(r"\s*\d+[.)]")
_CODE_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})(.*)$", re.M)

_LANGUAGE_CHARACTERS = 500
"""Characters that the language is identified from; more hardly change the result."""
_LANGUAGE_MIN_CHARACTERS = 60
"""The language of a shorter text is a guess."""
_LANGUAGE_MIN_SHARE = 0.95
_RARE_SHARE = 0.01
"""A language is rare if a smaller share of the rows is in it."""
_RARE_MIN_ROWS = 100
"""With fewer rows whose language is clear, no language is called rare."""


def weak_answers(answers: Sequence[str], place: RowLocation) -> Iterator[Found]:
    """A warning for the first of the learned answers of each kind: empty, boilerplate, or with an end that is certainly missing."""
    seen: set[str] = set()
    for text in answers:
        weakness = find_weakness(text)
        if weakness is None or weakness[0] in seen:
            continue
        code, message, hint = weakness
        seen.add(code)
        yield Found("warning", Problem(code=code, message=message, where=place.where, excerpt=excerpt(text, place.line), hint=hint), place)


def learned_answers(conversation: Conversation, *, train_on: Literal["assistant", "all", "last"]) -> list[str]:
    """The texts that are learned as answers, without turns that call a tool and have no text."""
    if conversation.text is not None:
        return [conversation.text]
    if train_on != "last" and not conversation.context_only:
        every = [turn for turn in conversation.turns if turn["role"] == "assistant"]
        return _texts_of(every)
    numbers = [at for at, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]
    if train_on == "last":
        numbers = numbers[-1:]
    if conversation.context_only:
        numbers = [at for at in numbers if at not in conversation.context_only]
    turns = [conversation.turns[at] for at in numbers]
    return _texts_of(turns)


def _texts_of(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of the turns; none for a turn that only calls tools."""
    return [turn.get("content") or "" for turn in turns if "tool_calls" not in turn or (turn.get("content") or "").strip()]


def end_class(answer: str) -> int:
    """How an answer ends: 0 unknown (short, ends in a list, table or code, or a script without capitals), 1 closed, 2 open."""
    text = answer.rstrip()
    if len(text) < 2 * _PROSE_WORDS or len(text.split(None, _PROSE_WORDS - 1)) < _PROSE_WORDS:
        return 0
    line = text[text.rfind("\n") + 1 :]
    first = line[:1] if line[:1] > " " else line.lstrip()[:1]
    if first in ("-", "*", "+", "|", "#", "`", "~", "<") or line[:1] in (" ", "\t") or (first.isdigit() and _NUMBERED.match(line)):
        return 0
    if text[-1].isalpha() and text[-1].lower() == text[-1].upper():
        return 0
    return _OPEN if text[-1] in ",-–(" or text[-1].isalpha() else _CLOSED


def answer_mark(answer: str) -> int:
    """The number of characters of an answer, and a hash of it in the lower 32 bits; 0 for no answer."""
    return len(answer) << 32 | zlib.crc32(answer.encode("utf-8", "surrogatepass")) if answer else 0


def answer_tokens(tokenized: Tokenized, end_ids: Sequence[int]) -> int:
    """The number of tokens of the last stretch of targets, up to its first end token."""
    learned = np.flatnonzero(tokenized.targets)
    if not len(learned):
        return 0
    gaps = np.flatnonzero(np.diff(learned) > 1)
    answer = tokenized.tokens[learned[gaps[-1] + 1 if len(gaps) else 0] : learned[-1] + 1]
    ends = np.flatnonzero(np.isin(answer, end_ids))
    return int(ends[0]) if len(ends) else len(answer)


def last_answer(conversation: Conversation) -> str:
    """The answer that `learned_answers` gives for train_on "last", or ""; faster, because it is called for every row."""
    if conversation.text is not None:
        return conversation.text
    for at in range(len(conversation.turns) - 1, -1, -1):
        turn = conversation.turns[at]
        if turn["role"] == "assistant":
            return "" if at in conversation.context_only else turn.get("content") or ""
    return ""


def find_weakness(text: str) -> tuple[str, str, str] | None:
    """Code, message and hint of what is wrong with one answer, if anything."""
    thought = _THOUGHTS.match(text) if "<think" in text else None
    rest = text[thought.end() :] if thought else text
    first = rest[:1]
    if first.isalpha() and not (first in _FIRST_LETTERS and _SUSPECT.match(rest)) and "```" not in rest and "~~~" not in rest:
        return None  # a quick exit that nearly all answers take: none of the rules below can match
    if _NO_WORD.match(rest):
        what = "nothing follows the thoughts in the answer" if thought else "the answer holds no word, digit or symbol"
        return "data.empty-answer", f"{what}, and the model learns to answer like that", "remove the row, unless it is meant"
    plain = " ".join(rest[:400].replace("’", "'").split()).lower()
    short = len(rest.strip()) <= 100
    if (short and (_TEMPLATE_FIELD.fullmatch(plain) or _STUB.fullmatch(plain))) or _BOILERPLATE.match(plain):
        kind = "is a placeholder" if short and not _BOILERPLATE.match(plain) else "begins like boilerplate"
        return "data.boilerplate-answer", f"the answer {kind}, which the model learns to say", "remove the row, unless it is meant"
    if ("```" in rest or "~~~" in rest) and _open_fence(rest):
        message = "the answer may be cut: its last code fence is not closed"
    elif _open_json(rest.strip()):
        message = "the answer may be cut: it is JSON that ends before its last bracket"
    else:
        return None
    return "data.cut-answer", message, "read the original again, or remove the row"


def _open_json(text: str) -> bool:
    """Whether the text is valid JSON up to its end, where something is missing."""
    if not _JSON_START.match(text):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


def _open_fence(text: str) -> bool:
    """Whether a Markdown code fence is open at the end; a closing fence has the same mark, is as long, and nothing follows it."""
    mark = ""
    for match in _CODE_FENCE.finditer(text):
        fence, after = match[1], match[2].strip()
        if not mark:
            if "`" not in after or fence[0] == "~":
                mark = fence
        elif fence[0] == mark[0] and len(fence) >= len(mark) and not after:
            mark = ""
    return bool(mark)


def languages_known() -> bool:
    """Whether py3langid, which identifies languages, is installed."""
    return find_spec("py3langid") is not None


def open_identifier() -> Callable[[str], str]:
    """Load the model (half a second); returns a function from a text to its ISO 639 code, or "" if that is not clear."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def identify(text: str) -> str:
        if len(text) < _LANGUAGE_MIN_CHARACTERS:
            return ""
        language, share = identifier.classify(text[:_LANGUAGE_CHARACTERS])
        return str(language) if share >= _LANGUAGE_MIN_SHARE and language != "zxx" else ""  # zxx: no language at all

    return identify


def rare_languages(languages: Sequence[str]) -> tuple[str, set[str]]:
    """The language of most rows, and the rare languages; ("", no languages) if the language of too few rows is clear."""
    counts = Counter(language for language in languages if language)
    if counts.total() < _RARE_MIN_ROWS:
        return "", set()
    return counts.most_common(1)[0][0], {language for language, count in counts.items() if count < _RARE_SHARE * counts.total()}
