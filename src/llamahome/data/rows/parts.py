"""Which column of a row is the question, what it is about, the system text and the answer, told by the usual names of each.

The tables are by part, not by data set. A name of a later rank counts only where none of an earlier one is there. Two columns of one rank
for one part are unclear, and so is a question beside choices that the prompt would lack: such rows are refused, never guessed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

Part = Literal["system", "prompt", "context", "completion"]

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "system_instructions", "sys_prompt")
PROMPT = (
    *("prompt", "question", "query", "instruction", "instructions", "problem", "request"),
    *("user", "human", "ask", "user_prompt", "user_message", "user_input", "user_query", "prompt_text", "question_text"),
)
WEAK_PROMPT = (("input", "inputs", "input_text"), ("source", "source_text", "src"))
"""What is a question where nothing else is: beside an instruction `input` is what it is about, and `source` says where the row is from."""
CONTEXT = ("context", "passage", "background", "document", "article", "paragraph", "story", *WEAK_PROMPT[0])
COMPLETION = (
    *("completion", "response", "output", "answer", "answers", "solution", "reply", "target", "chosen"),
    *("assistant", "gpt", "bot", "model_response", "assistant_response", "model_output", "output_text", "target_text"),
    *("outputs", "responses", "targets", "tgt", "response_text", "answer_text", "completion_text"),
    *("correct_answer", "best_answer", "final_answer", "expected_answer", "expected_output", "reference_answer"),
)
CHOICES = ("choices", "options", "endings", "candidates", "alternatives")
_ABOUT_TEXT = "text may be what the question is about"
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^0-9A-Za-z]+")


@dataclass(frozen=True)
class Parts:
    """The column of each part."""

    prompt: str
    completion: str
    system: str | None = None
    context: tuple[str, ...] = ()
    """What the question is about; read after it."""

    def columns(self) -> tuple[str, ...]:
        """All that are read."""
        return tuple(name for name in (self.system, self.prompt, *self.context, self.completion) if name is not None)


@dataclass(frozen=True)
class Unclear:
    """What the names tell, and why they do not tell enough."""

    why: str = ""
    """Empty when a question or an answer is missing altogether."""
    found: Mapping[Part, tuple[str, ...]] = field(default_factory=dict)
    text_is_context: bool = False
    """Whether `text` beside question and answer may be what the question is about."""


@lru_cache(maxsize=4096)
def plain_name(key: str) -> str:
    """The name in small letters with one underscore between words: `System Prompt`, `systemPrompt` and `SYSTEM-PROMPT` are one."""
    spread = key if key.isupper() else _WORD.sub("_", key)
    return _WORD.sub("_", spread).strip("_").lower()


def find_parts(value: Mapping[str, Any], *, taken: Mapping[str, str]) -> Parts | Unclear:
    """The parts of the row; `taken` says which column a part has already (data.columns), and nothing is added to a prompt given so."""
    free = {key: plain_name(key) for key in value if isinstance(key, str) and key not in taken.values()}
    found: dict[Part, tuple[str, ...]] = {part: (taken[part],) for part in ("system", "prompt", "completion") if part in taken}
    found.setdefault("prompt", _strongest(free, (PROMPT, *WEAK_PROMPT), exact="prompt"))
    found.setdefault("completion", _strongest(free, (COMPLETION,), exact="completion"))
    found.setdefault("system", () if taken else _strongest(free, (SYSTEM,), exact="system"))
    about = [key for key in free if free[key] in CONTEXT and key not in found["prompt"]]
    found["context"] = () if "prompt" in taken else tuple(sorted(about, key=lambda key: CONTEXT.index(free[key])))
    why = _unclear(found, value, free, taken)
    if why is not None:
        return Unclear(why, found, text_is_context=why == _ABOUT_TEXT)
    return Parts(found["prompt"][0], found["completion"][0], next(iter(found["system"]), None), found["context"])


def about_of(value: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that say what a question is about, in the order in which they are read."""
    names = {key: plain_name(key) for key in value if isinstance(key, str)}
    return tuple(sorted((key for key in names if names[key] in CONTEXT), key=lambda key: CONTEXT.index(names[key])))


def system_of(value: Mapping[str, Any]) -> str | None:
    """The one column that is the system text; None where there is none, or several."""
    found = _strongest({key: plain_name(key) for key in value if isinstance(key, str)}, (SYSTEM,), exact="system")
    return found[0] if len(found) == 1 else None


def _strongest(free: Mapping[str, str], ranks: tuple[tuple[str, ...], ...], *, exact: str) -> tuple[str, ...]:
    """The columns of the first rank that has any; the one that is spelled as our own is alone."""
    if exact in free:
        return (exact,)
    return next((keys for rank in ranks if (keys := tuple(key for key in free if free[key] in rank))), ())


def _unclear(
    found: Mapping[Part, tuple[str, ...]], value: Mapping[str, Any], free: Mapping[str, str], taken: Mapping[str, str]
) -> str | None:
    """Why these are not the parts of a row; "" when one is missing; None when they are."""
    if not found["prompt"] or not found["completion"]:
        return ""
    for several, what in ((found["completion"], "the answer"), (found["prompt"], "the question"), (found["system"], "the system text")):
        if len(several) > 1:
            return f"{_either(several)} may be {what}"
    if {"prompt", "completion"} <= {*taken, *value}:
        return None
    choices = next((key for key in free if free[key] in CHOICES), None)
    if choices is not None and "prompt" not in taken:
        return f"the question alone would lack its {choices}"
    text, answer = value.get("text"), first_answer(value.get(found["completion"][0]))
    if isinstance(text, str) and isinstance(answer, str) and answer.strip() not in text and not taken:
        return _ABOUT_TEXT
    return None


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def answer_of(value: Mapping[str, Any], key: str) -> Any:
    """The answer under `key`; the first of several, which a column of our own name does not have."""
    if key == "completion":
        return value[key]
    return first_answer(answers_in(value[key]) if plain_name(key) == "answers" else value[key])


def answers_in(cell: object) -> object:
    """What `answers` of a table hold: several in JSON text, as a table writes a list or `{"text": [...]}`; any other cell as it is."""
    if not isinstance(cell, str) or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return found if isinstance(first_answer(found), str) else cell


def first_answer(value: object) -> object:
    """The first of several answers to one question: of a list of texts, or of `{"text": [...]}` or `{"value": ...}`; others as they are."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("text", "value") if isinstance(value.get(key), list | str)), value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value[0] if value else ""
    return value
