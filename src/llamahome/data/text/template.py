"""Renders a model's chat template so that the same chat gives the same text on every day, also for templates without a system turn.

A template that shows the date gets TEMPLATE_DATE while rows are prepared, so that a row has the same tokens in a prepared store, in a
stream and after a resume. Otherwise the template gets the same variables as in transformers; tests compare the two.

For templates without a system turn, such as those of Gemma and the first Mistral models, the system text is put before the first question.
A prefix of the template does this, so that a row keeps its turns, and chat, transformers and vLLM render the saved template alike.
"""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from llamahome.data.rows.row_error import RowError
from llamahome.data.rows.toolcalls import with_contents, with_text_arguments
from llamahome.data.text.growing_calls import TooCostly
from llamahome.data.text.tokenizer_files import SystemRole
from llamahome.errors import ConfigError, Problem

TEMPLATE_DATE = datetime.date(2025, 1, 1)
"""The date in rows whose template shows the current date."""
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError),
    *(RecursionError, SyntaxError, MemoryError),
)
"""What a template may raise while it is compiled and rendered: its own refusal, or an error in it."""
_PROBE: dict[str, Any] = {"type": "function", "id": "abcdefghi", "function": {"name": "probe", "arguments": {"probe_key": "probe_value"}}}
"""A tool call that shows which form of calls a template supports; its id has the nine letters that Mistral's templates require."""
_WORDS = ("probe", "probe_key", "probe_value")
_AS_PYTHON = str(_PROBE["function"]["arguments"])
_CallForm = Callable[[Sequence[dict[str, Any]]], Sequence[dict[str, Any]]]
_CALL_FORMS: tuple[_CallForm, ...] = (list, with_text_arguments, with_contents, lambda turns: with_text_arguments(with_contents(turns)))
"""Turns with calls unchanged; with arguments as JSON text; with an empty content if there is none; with both."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MERGING = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] ~ '\\n\\n' ~ messages[1]['content']}] + messages[2:] -%}"
    "{%- endif -%}{{ '' }}"
)
"""Put before a template. The expression at its end keeps Jinja from removing a line break at the beginning of the template."""
_MERGING_FAMILIES = ("<start_of_turn>", "[INST]")
"""Found in the templates of Gemma and Mistral, whose authors recommend to put a system text before the first question."""
_PROBE_SYSTEM = "zebra crossing"
_MAX_ROLES = 8


class ChatTemplate:
    """A model's template (one for chats, perhaps another for chats with tools), compiled at first use."""

    def __init__(self, plain: str, with_tools: str, *, compiler: Callable[[str], Any], variables: dict[str, Any]) -> None:
        self._texts = {False: plain, True: with_tools}
        self._merging: ChatTemplate | None = None
        self.text = plain
        self.merges_system = False
        """Whether it writes the system text before the first question."""
        self._compiler = compiler
        self._variables = variables
        self._compiled: dict[str, Any] = {}
        self._call_forms: dict[bool, _CallForm] = {}
        self.shows_date = any("strftime_now" in text for text in self._texts.values())
        """Whether it shows the current date."""
        self.has_marks = _GENERATION.search(plain) is not None
        """Whether it marks what the assistant writes with `{% generation %}`."""

    def merging_system(self) -> "ChatTemplate":
        """The same template, but with the system text before the first question; made once."""
        if self._merging is None:
            texts = MERGING + self._texts[False], MERGING + self._texts[True]
            self._merging = ChatTemplate(*texts, compiler=self._compiler, variables=self._variables)
            self._merging.merges_system = True
        return self._merging

    def render(self, turns: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]], prompt: bool, date: datetime.date) -> str:
        """The chat as one text; `prompt` appends the beginning of an answer. Raises RowError if the template refuses the chat."""
        try:
            return self._rendered(self._template(tools), self._arguments(turns, tools, prompt=prompt, date=date))
        except _TEMPLATE_ERRORS as error:
            raise _refused(error) from error

    def render_marked(self, turns: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The chat as one text, and the character ranges of its `{% generation %}` blocks; raises RowError."""
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        template = self._template(tools)
        try:
            arguments = self._arguments(turns, tools, prompt=False, date=TEMPLATE_DATE)
            template.environment.begin(arguments)
            with template.environment.activate_tracker(blocks, marks):
                for block in template.generate(arguments):
                    blocks.append(block)
        except _TEMPLATE_ERRORS as error:
            raise _refused(error) from error
        return "".join(blocks), marks

    @staticmethod
    def _rendered(template: Any, arguments: dict[str, Any]) -> str:
        template.environment.begin(arguments)
        return str(template.render(arguments))

    def _template(self, tools: Sequence[dict[str, Any]]) -> Any:
        text = self._texts[bool(tools)]
        if text not in self._compiled:
            try:
                self._compiled[text] = self._compiler(text)
            except _TEMPLATE_ERRORS as error:
                raise _refused(error) from error
        return self._compiled[text]

    def _arguments(
        self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, prompt: bool, date: datetime.date
    ) -> dict[str, Any]:
        if any("tool_calls" in turn for turn in turns):
            turns = self._call_form(tools)(turns)
        return self._all_arguments(turns, tools, prompt=prompt, date=date)

    def _call_form(self, tools: Sequence[dict[str, Any]]) -> _CallForm:
        """The form of calls for this template: the first in which it shows all of a call, else the first that it does not refuse."""
        key = bool(tools)
        if key not in self._call_forms:
            rendered = {form: self._render_call(form, tools) for form in _CALL_FORMS}
            complete = [form for form, text in rendered.items() if all(word in text for word in _WORDS) and _AS_PYTHON not in text]
            self._call_forms[key] = next(iter([*complete, *(form for form, text in rendered.items() if text), _CALL_FORMS[0]]))
        return self._call_forms[key]

    def _render_call(self, form: _CallForm, tools: Sequence[dict[str, Any]]) -> str:
        turns: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [_PROBE]}]
        try:
            return self._rendered(self._template(tools), self._all_arguments(form(turns), tools, prompt=False, date=TEMPLATE_DATE))
        except _TEMPLATE_ERRORS as error:
            _refused(error)
            return ""

    def _all_arguments(
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


def _refused(error: Exception) -> RowError:
    """The error of a row. Raises ConfigError if no row should be tried, because the template takes too much time or memory."""
    if isinstance(error, TooCostly):
        message = f"the chat template is refused: {error}"
        hint = "use another template: model.chat_template names a file"
        raise ConfigError(Problem(code="model.template-too-costly", message=message, where="model.chat_template", hint=hint)) from error
    return RowError("data.template-refused", f"the model's chat template refuses this chat: {error}")


def with_system_role(template: ChatTemplate, role: SystemRole) -> ChatTemplate:
    """The template for rows under model.system_role: unchanged, or with system texts before the first question."""
    family = any(sign in template.text for sign in _MERGING_FAMILIES)
    return template.merging_system() if role == "merge" or (role == "auto" and family and takes_system(template) is False) else template


def takes_system(template: ChatTemplate) -> bool | None:
    """Whether the template shows a system turn; None if it also refuses chats without one."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        _rendered(template, chat)
    except RowError:
        return None
    try:
        return _PROBE_SYSTEM in _rendered(template, [{"role": "system", "content": _PROBE_SYSTEM}, *chat])
    except RowError:
        return False


def with_remedy(error: RowError, turns: Sequence[Mapping[str, Any]], template: ChatTemplate) -> RowError:
    """The error with a hint that helps, if the template refused the chat or left out the system turn.

    If a template refuses a chat for another reason (turns that do not alternate, unknown roles), no setting helps.
    """
    if error.code not in ("data.template-refused", "data.turn-left-out"):
        return error
    hint, message = error.hint, error.message
    if turns[0]["role"] == "system" and takes_system(template) is False and _merging_helps(turns, template):
        hint = "--set model.system_role=merge puts the system text before the first question"
    elif error.code == "data.template-refused":
        message = f"{message}; its turns: {_roles(turns)}"
    return RowError(error.code, message, hint=hint, part=error.part)


def _roles(turns: Sequence[Mapping[str, Any]]) -> str:
    roles = [f"{turn['role']} (tool calls)" if turn.get("tool_calls") else str(turn["role"]) for turn in turns]
    return ", ".join(roles if len(roles) <= _MAX_ROLES else [*roles[:_MAX_ROLES], f"and {len(roles) - _MAX_ROLES} more"])


def _merging_helps(turns: Sequence[Mapping[str, Any]], template: ChatTemplate) -> bool:
    """Whether the template shows all of this chat if the system text is before the first question."""
    try:
        return str(turns[0]["content"]).strip() in _rendered(template.merging_system(), [dict(turn) for turn in turns])
    except RowError:
        return False


def _rendered(template: ChatTemplate, turns: Sequence[dict[str, Any]]) -> str:
    return template.render(turns, tools=(), prompt=False, date=TEMPLATE_DATE)
