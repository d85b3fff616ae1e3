"""System turns for templates that take none: the system text goes before the first question, as Gemma and the first Mistral want it.

It is done in the template itself, by a few words put before it. So a row keeps its turns, and whoever uses the saved template later (chat,
transformers, vLLM) writes a system text as it was trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llamahome.data.rows.fault import Finding
from llamahome.data.text.place import SystemRole
from llamahome.data.text.template import TEMPLATE_DATE, ChatTemplate

MERGING = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] ~ '\\n\\n' ~ messages[1]['content']}] + messages[2:] -%}"
    "{%- endif -%}{{ '' }}"
)
"""Put before a template. The last words keep the beginning of the template from being taken for the end of a block."""
_FAMILIES = ("<start_of_turn>", "[INST]")
"""Signs of the templates of Gemma and of Mistral, whose makers say to put a system text before the first question."""
_SYSTEM = "zebra crossing"


def for_system_turns(own: ChatTemplate, role: SystemRole) -> ChatTemplate:
    """The template with which rows are written: `own`, or one that writes system texts before the first question."""
    merged = role == "merge" or (role == "auto" and any(sign in own.text for sign in _FAMILIES) and takes_system(own) is False)
    return own.preceded_by(MERGING) if merged else own


def takes_system(template: ChatTemplate) -> bool | None:
    """Whether the template writes a system turn; None when it refuses chats without one too."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        _written(template, chat)
    except Finding:
        return None
    try:
        return _SYSTEM in _written(template, [{"role": "system", "content": _SYSTEM}, *chat])
    except Finding:
        return False


def way_out(finding: Finding, turns: Sequence[Mapping[str, Any]], template: ChatTemplate) -> Finding:
    """The finding with a help line that mends it, where the template refused the chat or left the system turn out."""
    if finding.code not in ("data.template-refused", "data.turn-left-out"):
        return finding
    if turns[0]["role"] == "system" and takes_system(template) is False and _merging_helps(turns, template):
        hint = "--set model.system_role=merge puts the system text before the first question"
    else:
        hint = finding.hint or "--set model.chat_template=FILE.jinja with a template that takes such chats"
    return Finding(finding.code, finding.message, hint=hint, part=finding.part)


def _merging_helps(turns: Sequence[Mapping[str, Any]], template: ChatTemplate) -> bool:
    """Whether the template writes this very chat, its system text too, once that stands before the first question."""
    try:
        return str(turns[0]["content"]).strip() in _written(template.preceded_by(MERGING), [dict(turn) for turn in turns])
    except Finding:
        return False


def _written(template: ChatTemplate, turns: Sequence[dict[str, Any]]) -> str:
    return template.render(turns, tools=(), prompt=False, date=TEMPLATE_DATE)
