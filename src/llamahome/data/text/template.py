"""Renders a model's chat template, always in the same way: the same chat gives the same text on every day.

A template that shows the date gets TEMPLATE_DATE while rows are prepared, so that a row has the same tokens in a prepared store, in a
stream and after a resume. What the template sees is otherwise what transformers gives it; tests compare the two.
"""

import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from llamahome.data.rows.fault import Finding
from llamahome.data.rows.toolcalls import with_contents, with_text_arguments

TEMPLATE_DATE = datetime.date(2025, 1, 1)
"""The date in rows whose template writes the day it is rendered on."""
_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""What a template may raise while it renders: its own refusal, or a mistake in it."""
_PROBE: dict[str, Any] = {"type": "function", "id": "abcdefghi", "function": {"name": "probe", "arguments": {"probe_key": "probe_value"}}}
"""A call with which it is found how a template wants calls; its id has the nine letters that Mistral's templates ask for."""
_WORDS = ("probe", "probe_key", "probe_value")
_AS_PYTHON = str(_PROBE["function"]["arguments"])
_Way = Callable[[Sequence[dict[str, Any]]], Sequence[dict[str, Any]]]
_WAYS: tuple[_Way, ...] = (list, with_text_arguments, with_contents, lambda turns: with_text_arguments(with_contents(turns)))
"""Turns with calls as they are; arguments as JSON text; an empty content where there is none; both."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The texts of a model's template (one for chats, perhaps another for chats with tools), compiled when first used."""

    def __init__(self, plain: str, with_tools: str, *, compiler: Callable[[str], Any], variables: dict[str, Any]) -> None:
        self._texts = {False: plain, True: with_tools}
        self._preceded: ChatTemplate | None = None
        self.text = plain
        self.merges_system = False
        """Whether it was made to write a system text before the first question."""
        self._compiler = compiler
        self._variables = variables
        self._compiled: dict[str, Any] = {}
        self._ways: dict[bool, _Way] = {}
        self.shows_date = any("strftime_now" in text for text in self._texts.values())
        """Whether it asks for the day it is rendered on."""
        self.has_marks = _GENERATION.search(plain) is not None
        """Whether it says itself what the assistant writes, with `{% generation %}`."""

    def preceded_by(self, words: str) -> "ChatTemplate":
        """The same template with the words before it that move a system text; made once, and always with the same words."""
        if self._preceded is None:
            texts = words + self._texts[False], words + self._texts[True]
            self._preceded = ChatTemplate(*texts, compiler=self._compiler, variables=self._variables)
            self._preceded.merges_system = True
        return self._preceded

    def render(self, turns: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]], prompt: bool, date: datetime.date) -> str:
        """The chat as one text, with the beginning of an answer when `prompt`; raises Finding when the template refuses it."""
        try:
            return str(self._template(tools).render(self._given(turns, tools, prompt=prompt, date=date)))
        except _FAULTS as error:
            raise _refused(error) from error

    def render_marked(self, turns: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The chat as one text, and the stretches of it that stand in `{% generation %}`; raises Finding."""
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        template = self._template(tools)
        try:
            with template.environment.activate_tracker(blocks, marks):
                for block in template.generate(self._given(turns, tools, prompt=False, date=TEMPLATE_DATE)):
                    blocks.append(block)
        except _FAULTS as error:
            raise _refused(error) from error
        return "".join(blocks), marks

    def _template(self, tools: Sequence[dict[str, Any]]) -> Any:
        text = self._texts[bool(tools)]
        if text not in self._compiled:
            try:
                self._compiled[text] = self._compiler(text)
            except _FAULTS as error:
                raise _refused(error) from error
        return self._compiled[text]

    def _given(
        self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, prompt: bool, date: datetime.date
    ) -> dict[str, Any]:
        if any("tool_calls" in turn for turn in turns):
            turns = self._way_of_calls(tools)(turns)
        return self._with(turns, tools, prompt=prompt, date=date)

    def _way_of_calls(self, tools: Sequence[dict[str, Any]]) -> _Way:
        """How calls are given to this template: the first way in which it writes all of a call, else the first that it does not refuse."""
        key = bool(tools)
        if key not in self._ways:
            shown = {way: self._shown_call(way, tools) for way in _WAYS}
            whole = [way for way, text in shown.items() if all(word in text for word in _WORDS) and _AS_PYTHON not in text]
            self._ways[key] = next(iter([*whole, *(way for way, text in shown.items() if text), _WAYS[0]]))
        return self._ways[key]

    def _shown_call(self, way: _Way, tools: Sequence[dict[str, Any]]) -> str:
        turns: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [_PROBE]}]
        try:
            return str(self._template(tools).render(self._with(way(turns), tools, prompt=False, date=TEMPLATE_DATE)))
        except _FAULTS:
            return ""

    def _with(
        self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, prompt: bool, date: datetime.date
    ) -> dict[str, Any]:
        return {
            **self._variables,
            "messages": list(turns),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            "strftime_now": date.strftime,
        }


def _refused(error: Exception) -> Finding:
    return Finding("data.template-refused", f"the model's chat template refuses this chat: {error}")
