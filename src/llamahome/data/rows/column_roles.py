"""Which columns of a row are its question, context, system text and answer, recognised by the usual names of each.

The tables of names are by role, not by data set. A name of a later rank counts only if there is none of an earlier rank. Two columns of one
rank for one role are unclear, and so is a question beside choices that the prompt would lack: such rows are refused instead of guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from llamahome.data.files.jsontext import json_or_none

Part = Literal["system", "prompt", "context", "completion"]

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "system_instructions", "sys_prompt")
PROMPT = (
    *("prompt", "question", "query", "instruction", "instructions", "problem", "request"),
    *("user", "human", "ask", "user_prompt", "user_message", "user_input", "user_query", "prompt_text", "question_text"),
    "text_input",
)
WEAK_PROMPT = (("input", "inputs", "input_text"), ("source", "sources", "source_text", "src"))
"""Questions only if nothing else is: beside an instruction `input` is its context, and `source` says where the row is from."""
CONTEXT = ("context", "passage", "background", "document", "article", "paragraph", "story", *WEAK_PROMPT[0])
COMPLETION = (
    *("completion", "response", "output", "answer", "answers", "solution", "reply", "target", "chosen"),
    *("assistant", "gpt", "bot", "model_response", "assistant_response", "model_output", "output_text", "target_text"),
    *("outputs", "responses", "targets", "tgt", "response_text", "answer_text", "completion_text", "text_output"),
    *("correct_answer", "best_answer", "final_answer", "expected_answer", "expected_output", "reference_answer"),
)
TEXTS = (
    *("text", "texts", "article", "articles", "document", "documents", "dialogue", "dialogues", "dialog", "conversation", "transcript"),
    *("passage", "passages", "paragraph", "paragraphs", "story", "stories", "content", "body", "report", "paper", "post", "meeting"),
    *("full_text", "original_text", "article_text", "document_text", "article_body", "article_content", "news_article"),
)
"""Texts that are the question if an answer beside them is made of them, as a summary is."""
DERIVED = (
    *("summary", "summaries", "highlights", "highlight", "tldr", "tl_dr", "paraphrase", "paraphrases", "translation", "translations"),
    *("summary_text", "summarized_text", "reference_summary", "gold_summary", "target_summary", "translated_text", "paraphrased_text"),
)
"""Answers that are made of a text beside them."""
ABSTRACT = ("abstract", "abstracts")
"""Such an answer beside an article; beside `text` it may as well be another text of the same paper."""
_METADATA = {
    *("id", "idx", "index", "title", "category", "source", "url", "link", "language", "lang", "split", "dataset", "subset", "date"),
    *("type", "topic", "domain", "author", "name", "license", "task", "level"),
}
"""Columns that describe a row and are never its question."""
CHOICES = ("choices", "options", "endings", "candidates", "alternatives")
_ONE_CHOICE = re.compile(r"(?:(?:option|choice|op|opt|alternative|ending)_?)?[a-e]|(?:option|choice|alternative|ending)_?[0-9]")
"""Matches the name of a column that holds one of several choices: `A`, `option_b`, `choice1`, `opc`."""
_AVOIDED = {
    *("rejected", "reject", "wrong", "incorrect", "bad", "worse", "worst", "losing", "loser", "undesirable", "dispreferred", "unchosen"),
    *("negative", "nonpreferred", "false", "distractor", "refused", "unsafe", "hallucinated", "corrupted"),
}
"""Words in the names of answers that are not to be learned."""
_ABOUT_TEXT = "text may be what the question is about"
_RATED = "holds several answers"
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^0-9A-Za-z]+")


@dataclass(frozen=True)
class ColumnRoles:
    """The column of each role."""

    prompt: str
    completion: str
    system: str | None = None
    context: tuple[str, ...] = ()
    """What the question is about; added after it."""

    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(name for name in (self.system, self.prompt, *self.context, self.completion) if name is not None)


@dataclass(frozen=True)
class Unclear:
    """The columns that may have each role, and why that is not clear enough."""

    why: str = ""
    """Empty if a question or an answer is missing."""
    candidates: Mapping[Part, tuple[str, ...]] = field(default_factory=dict)
    text_is_context: bool = False
    """Whether `text` beside question and answer may be what the question is about."""
    rated: bool = False
    """Whether the answer is a list of which the columns do not say which one is to be learned."""


@lru_cache(maxsize=4096)
def plain_name(key: str) -> str:
    """The name in lower case with one underscore between words: `System Prompt`, `systemPrompt` and `SYSTEM-PROMPT` are the same."""
    spread = key if key.isupper() else _WORD.sub("_", key)
    return _WORD.sub("_", spread).strip("_").lower()


def find_roles(value: Mapping[str, Any], given: Mapping[str, str] | None = None) -> ColumnRoles | Unclear:
    """The roles of the row's columns; `given` are those that data.columns sets, and nothing is added to a prompt that it sets."""
    given = given or {}
    names = {key: plain_name(key) for key in value if isinstance(key, str) and key not in given.values()}
    roles: dict[Part, tuple[str, ...]] = {role: (given[role],) for role in ("system", "prompt", "completion") if role in given}
    roles.setdefault("prompt", _first_rank(names, (PROMPT, *WEAK_PROMPT), exact="prompt"))
    roles.setdefault("completion", _first_rank(names, (COMPLETION,), exact="completion"))
    roles.setdefault("system", () if given else _first_rank(names, (SYSTEM,), exact="system"))
    roles["context"] = () if "prompt" in given else tuple(key for key in _context(names) if key not in roles["prompt"])
    if not given:
        roles |= _derived(roles, value, names)
    why = _unclear(roles, value, names, given)
    if why is not None:
        return Unclear(why, roles, text_is_context=why == _ABOUT_TEXT, rated=_RATED in why)
    return ColumnRoles(roles["prompt"][0], roles["completion"][0], next(iter(roles["system"]), None), roles["context"])


def context_columns(value: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that say what a question is about, in the order in which they are added to it."""
    return _context({key: plain_name(key) for key in value if isinstance(key, str)})


def system_column(value: Mapping[str, Any]) -> str | None:
    """The one column that is the system text; None if there is none, or several."""
    columns = _first_rank({key: plain_name(key) for key in value if isinstance(key, str)}, (SYSTEM,), exact="system")
    return columns[0] if len(columns) == 1 else None


def answer_beside(value: Mapping[str, Any], turns: str) -> dict[str, str] | None:
    """The value of data.columns that reads a list of turns as the prompt and the one text beside it that is an answer by its name.

    None if there is no such text, or several.
    """
    answers = [key for key, cell in value.items() if key != turns and isinstance(cell, str) and cell and plain_name(key) in COMPLETION]
    system = system_column(value)
    before = {"system": system} if system else {}
    return {**before, "prompt": turns, "completion": answers[0]} if len(answers) == 1 else None


def choice_columns(value: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns with the choices of a question: one with all of them, or one for each, at least two."""
    names = {key: plain_name(key) for key in value if isinstance(key, str)}
    together = next((key for key in names if names[key] in CHOICES), None)
    single = tuple(key for key in names if _ONE_CHOICE.fullmatch(names[key]) and isinstance(value[key], str | int | float))
    return (together,) if together is not None else single if len(single) > 1 else ()


def says_avoided(key: str) -> bool:
    """Whether the name of a column says that its answers are not to be learned."""
    return not _AVOIDED.isdisjoint(plain_name(key).split("_"))


def _several_rated(key: str, value: Mapping[str, Any]) -> str | None:
    """Why one of several answers cannot be chosen: they are objects, or a column beside them rates each; None if they are alike."""
    answers = value.get(key)
    if not isinstance(answers, list) or len(answers) < 2:
        return None
    if all(isinstance(answer, dict) for answer in answers):
        if {"role", "from", "speaker", "author", "sender", "name", "function"} & answers[0].keys():  # turns, or calls of tools
            return None
        return f"{key} {_RATED}, each an object with {', '.join(list(answers[0])[:4])}"
    rating = next((name for name, cell in value.items() if name != key and _are_ratings(cell, len(answers))), None)
    return None if rating is None or not all(isinstance(answer, str) for answer in answers) else f"{key} {_RATED}, rated in {rating}"


def _are_ratings(cell: object, count: int) -> bool:
    return isinstance(cell, list) and len(cell) == count and all(isinstance(one, int | float) for one in cell) and len({*cell}) > 1


def answer_of(value: Mapping[str, Any], key: str) -> Any:
    """The answer under `key`; the first of several, except in a column called `completion`, which holds one."""
    cell = value[key]
    if key == "completion":
        return cell
    if plain_name(key) == "answers" and isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        answer = first_answer(json_or_none(cell))  # a table writes several answers as JSON text
        return answer if isinstance(answer, str) else cell
    return first_answer(cell)


def first_answer(value: object) -> object:
    """The first of several answers to one question: of a list of texts, or of `{"text": [...]}` or `{"value": ...}`; others as they are."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("text", "value") if isinstance(value.get(key), list | str)), value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value[0] if value else ""
    return value


def _derived(roles: Mapping[Part, tuple[str, ...]], value: Mapping[str, Any], names: Mapping[str, str]) -> dict[Part, tuple[str, ...]]:
    """Question and answer of a row that lacks one: an article with its summary, or a passage with an answer and no other text."""
    texts = {key: name for key, name in names.items() if value[key] is None or isinstance(value[key], str)}
    if roles["completion"]:
        known = {*roles["completion"], *roles["context"], *roles["system"]}
        others = {key for key, name in texts.items() if name not in _METADATA and not name.endswith("_id")}
        questions = {key for key, name in names.items() if name.removesuffix("s") in PROMPT}
        context = roles["context"]
        if roles["prompt"] or len(context) != 1 or context[0] not in texts or (others | questions) - known:
            return {}
        return {"prompt": context, "context": ()}
    questions_asked = tuple(key for key in roles["prompt"] if names[key] in PROMPT)
    articles = _first_rank(texts, (TEXTS,))
    only_text = not questions_asked and any(texts[key] in ("text", "texts") for key in articles)
    answers = _first_rank(texts, (DERIVED,) if only_text else (DERIVED, ABSTRACT))
    prompt = questions_asked or articles or roles["prompt"]
    if not answers or not prompt:
        return {}
    return {"prompt": prompt, "completion": answers, "context": roles["context"] if questions_asked else ()}


def _context(names: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted((key for key in names if names[key] in CONTEXT), key=lambda key: CONTEXT.index(names[key])))


def _first_rank(names: Mapping[str, str], ranks: tuple[tuple[str, ...], ...], *, exact: str = "") -> tuple[str, ...]:
    """The columns of the first rank that has any; a column called `exact` excludes all others."""
    if exact in names and exact:
        return (exact,)
    return next((keys for rank in ranks if (keys := tuple(key for key in names if names[key] in rank))), ())


def _unclear(
    roles: Mapping[Part, tuple[str, ...]], value: Mapping[str, Any], names: Mapping[str, str], given: Mapping[str, str]
) -> str | None:
    """Why these are not the roles of the row's columns; "" if one is missing; None if they are."""
    if not roles["prompt"] or not roles["completion"]:
        return ""
    for columns, what in ((roles["completion"], "the answer"), (roles["prompt"], "the question"), (roles["system"], "the system text")):
        if len(columns) > 1:
            return f"{', '.join(columns[:-1])} or {columns[-1]} may be {what}"
    if {"prompt", "completion"} <= {*given, *value}:
        return None
    choices = choice_columns(value)
    if choices and "prompt" not in given:
        return f"the question alone would lack its {', '.join(choices)}"
    if (several := _several_rated(roles["completion"][0], value)) is not None and "completion" not in given:
        return several
    text, answer = value.get("text"), first_answer(value.get(roles["completion"][0]))
    about_text = isinstance(text, str) and isinstance(answer, str) and answer.strip() not in text and roles["prompt"] != ("text",)
    return _ABOUT_TEXT if about_text and not given else None
