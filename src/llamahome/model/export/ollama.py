"""A Modelfile for Ollama: the GGUF file, the chat template in Ollama's language, stop words, sampling.

A chat template is a program in Jinja, and Ollama has a language of its own. The text around each turn is found by rendering chats with
marks in place of the turns. For several chats the translation must then give exactly what the model's own template gives.
Source: Ollama's Modelfile and template reference (docs.ollama.com/modelfile, docs.ollama.com/template).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamahome.errors import ConfigError, Problem

Turns = Sequence[Mapping[str, str]]
Render = Callable[[Turns], str]
"""Turns -> the prompt, ending where the assistant's answer begins."""
_MARK = "\u2983{}\u2984"


@dataclass(frozen=True)
class ChatFrame:
    """The text that a template writes around turns."""

    start: str
    around: Mapping[str, tuple[str, str]]
    """By role, what stands before a turn and after it."""
    answer: str
    """What stands after the last turn, where the answer begins."""
    default_system: str = ""
    """The system turn that the template writes where the chat has none."""

    def render(self, turns: Turns) -> str:
        """What the translated template gives for `turns`."""
        first = "" if turns and turns[0]["role"] == "system" else self.default_system
        written = "".join(self.around[turn["role"]][0] + turn["content"] + self.around[turn["role"]][1] for turn in turns)
        return self.start + first + written + self.answer

    def as_template(self) -> str:
        """The template in Ollama's language, over .Messages."""
        parts = [_quoted(self.start)]
        if self.default_system:
            parts.append(
                '{{- if not (and .Messages (eq (index .Messages 0).Role "system")) }}' + _quoted(self.default_system) + "{{- end }}"
            )
        branches = []
        for number, (role, (before, after)) in enumerate(self.around.items()):
            word = "if" if number == 0 else "else if"
            branches.append(f'{{{{- {word} eq .Role "{role}" }}}}' + _quoted(before) + "{{ .Content }}" + _quoted(after))
        parts.append("{{- range .Messages }}" + "".join(branches) + "{{- end }}{{- end }}")
        parts.append(_quoted(self.answer))
        return "".join(parts)


def _quoted(text: str) -> str:
    """Text as a string of the template language, because trimming and line ends in the open would change it."""
    if not text:
        return ""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return '{{- "' + escaped + '" }}'


def ollama_name(name: str) -> str:
    """The name of a model as Ollama takes it: small letters, digits and `-._`."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def find_frame(render: Render) -> ChatFrame:
    """The text around turns. Raises ConfigError export.untranslated-template when the template does more than put text around turns."""
    try:
        frame = _marked(render)
    except (ValueError, ConfigError) as error:
        raise _untranslated(str(error)) from error
    chats: list[Turns] = [
        [{"role": "user", "content": "What is 2 + 2?"}],
        [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}],
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four"},
            {"role": "user", "content": "five"},
        ],
    ]
    if "system" in frame.around:
        chats += [[{"role": "system", "content": "Be brief."}, *chat] for chat in chats[:3]]
    for chat in chats:
        if frame.render(chat) != render(chat):
            raise _untranslated("what it writes around a turn depends on more than the role of the turn")
    return frame


def _marked(render: Render) -> ChatFrame:
    user, answer, again, system = (_MARK.format(number) for number in range(4))
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}, {"role": "user", "content": again}]
    whole = render(turns)
    first, between, after_answer, end = _split(whole, (user, answer, again))
    alone_start, alone_end = _split(render(turns[:1]), (user,))
    if alone_end != end or alone_start != first:
        raise ValueError("the first turn is written in another way when more follow")
    start, before_user = _common_end(first, after_answer)
    after_assistant = after_answer.removesuffix(before_user)
    if between != end:  # both end a question and begin an answer
        raise ValueError("an answer begins in another way in the middle of a chat")
    around = {"user": (before_user, ""), "assistant": (between, after_assistant)}
    try:
        with_system = render([{"role": "system", "content": system}, *turns[:1]])
        system_start, between_system, _ = _split(with_system, (system, user))
    except (ValueError, ConfigError):
        return ChatFrame(start, around, between)
    after_system = between_system.removesuffix(before_user)
    if not between_system.endswith(before_user):
        raise ValueError("the system turn changes how the first question is written")
    if start.startswith(system_start) and start.endswith(after_system) and len(start) > len(system_start):
        return ChatFrame("", {"system": (system_start, after_system), **around}, between, default_system=start)
    if not system_start.startswith(start):
        raise ValueError("the start of a chat depends on whether it has a system turn")
    return ChatFrame(start, {"system": (system_start[len(start) :], after_system), **around}, between)


def _split(text: str, marks: Sequence[str]) -> list[str]:
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("a turn does not stand exactly once in the chat")
        parts.append(before)
    return [*parts, text]


def _common_end(first: str, second: str) -> tuple[str, str]:
    """What `first` has before the longest end that both have, and that end."""
    size = 0
    while size < min(len(first), len(second)) and first[len(first) - 1 - size] == second[len(second) - 1 - size]:
        size += 1
    return first[: len(first) - size], first[len(first) - size :]


def _untranslated(why: str) -> ConfigError:
    message = f"the chat template cannot be put into Ollama's language: {why}"
    return ConfigError(Problem(code="export.untranslated-template", message=message, where="--to", hint="--to gguf"))


def modelfile(
    gguf_name: str, frame: ChatFrame | None, *, stops: Sequence[str], sampling: Mapping[str, Any], system: str | None = None
) -> str:
    """The text of a Modelfile. Raises ConfigError when the system message cannot stand in one."""
    lines = [f"FROM ./{gguf_name}"]
    if frame is not None:
        lines.append(f'TEMPLATE """{frame.as_template()}"""')
    if system is not None:
        if (why := why_no_system(system, frame)) is not None:
            raise ConfigError(Problem(code="export.untranslated-template", message=why, where="--system"))
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {_argument(stop)}" for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    return "\n".join(lines) + "\n"


def why_no_system(system: str, frame: ChatFrame | None) -> str | None:
    """Why a Modelfile cannot set the system message; None if it can."""
    if '"""' in system or system.endswith('"'):
        return 'the system message holds """ or ends in a quotation mark, which a Modelfile cannot express'
    if frame is not None and "system" not in frame.around:
        return "the chat template has no system turn, so the model would never read it"
    return None


def _argument(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def sampling_of(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Ollama's parameters from a generation_config.json."""
    named = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty", "min_p": "min_p"}
    found = {ours: generation[theirs] for theirs, ours in named.items() if isinstance(generation.get(theirs), int | float)}
    return found if generation.get("do_sample") else {"temperature": 0}
