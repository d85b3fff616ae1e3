"""Renders a model's chat template, always in the same way: the same chat gives the same text on every day.

A template that shows the date gets TEMPLATE_DATE while rows are prepared, so that a row has the same tokens in a prepared store, in a
stream and after a resume. What the template sees is otherwise what transformers gives it; tests compare the two.
"""

import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from llamahome.data.fault import Finding
from llamahome.data.toolcalls import with_text_arguments

TEMPLATE_DATE = datetime.date(2025, 1, 1)
"""The date in rows whose template writes the day it is rendered on."""
_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""What a template may raise while it renders: its own refusal, or a mistake in it."""
_PROBE: dict[str, Any] = {"type": "function", "id": "abcdefghi", "function": {"name": "probe", "arguments": {"probe_key": "probe_value"}}}
"""A call with which it is found how a template writes arguments; its id has the nine letters that Mistral's templates ask for."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The texts of a model's template (one for chats, perhaps another for chats with tools), compiled when first used."""

    def __init__(self, plain: str, with_tools: str, *, compiler: Callable[[str], Any], variables: dict[str, Any]) -> None:
        self._texts = {False: plain, True: with_tools}
        self._compiler = compiler
        self._variables = variables
        self._compiled: dict[str, Any] = {}
        self._as_text: dict[bool, bool] = {}
        self.shows_date = any("strftime_now" in text for text in self._texts.values())
        """Whether it asks for the day it is rendered on."""
        self.has_marks = _GENERATION.search(plain) is not None
        """Whether it says itself what the assistant writes, with `{% generation %}`."""

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

    def _texts_arguments(self, tools: Sequence[dict[str, Any]]) -> bool:
        """Whether the template writes the arguments of a call as they are, so that they must be given as JSON text."""
        key = bool(tools)
        if key not in self._as_text:
            turns: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [_PROBE]}]
            try:
                shown = str(self._template(tools).render(self._with(turns, tools, prompt=False, date=TEMPLATE_DATE)))
                self._as_text[key] = str(_PROBE["function"]["arguments"]) in shown
            except TypeError:
                self._as_text[key] = True
            except _FAULTS:
                self._as_text[key] = False
        return self._as_text[key]

    def _given(
        self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, prompt: bool, date: datetime.date
    ) -> dict[str, Any]:
        if any("tool_calls" in turn for turn in turns) and self._texts_arguments(tools):
            turns = with_text_arguments(turns)
        return self._with(turns, tools, prompt=prompt, date=date)

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
