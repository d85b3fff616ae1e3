"""A hint about a chat that a template refuses is given only if it helps for that chat."""

from typing import Any

import pytest
from tests.support.templates import CHATML, FAMILIES, NO_SYSTEM

from llamahome.data.records import Conversation, Row
from llamahome.data.text.targets import Tokenized, tokenize
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import Problem

ALTERNATE = (
    "{%- for turn in messages -%}{%- if (turn.role == 'user') != (loop.index0 is even) -%}{{ raise_exception('roles must alternate') }}"
    "{%- endif -%}{%- endfor -%}" + CHATML
)
SYSTEM, USER, ANSWER = ({"role": role, "content": f"the {role}"} for role in ("system", "user", "assistant"))


def result(template: str, turns: list[dict[str, Any]], role: Any = "auto") -> Tokenized | Problem:
    tokenizer = ChatTokenizer(FAMILIES["ChatML"].tokenizer(template), system_role=role)
    (tokenized,) = tokenize([Conversation(Row(0, "x.jsonl", 1, {}), turns=tuple(turns))], tokenizer, train_on="assistant")
    return tokenized


@pytest.mark.parametrize("template", [NO_SYSTEM, ALTERNATE])
def test_merging_the_system_text_is_suggested_if_it_helps(template: str) -> None:
    turns = [SYSTEM, USER, ANSWER]
    refused = result(template, turns)
    assert isinstance(refused, Problem) and "--set model.system_role=merge" in str(refused.hint)
    assert isinstance(result(template, turns, "merge"), Tokenized)


@pytest.mark.parametrize(
    "turns", [[SYSTEM, USER, USER, ANSWER], [SYSTEM, ANSWER, USER, ANSWER], [USER, USER, ANSWER], [SYSTEM, SYSTEM, USER, ANSWER]]
)
def test_merging_the_system_text_is_not_suggested_if_it_does_not_help(turns: list[dict[str, Any]]) -> None:
    refused = result(ALTERNATE, turns)
    assert isinstance(refused, Problem) and refused.hint is None
    assert isinstance(result(ALTERNATE, turns, "merge"), Problem)


def test_system_role_turn_never_merges_and_merge_always_does() -> None:
    gemma = FAMILIES["Gemma"].template
    assert isinstance(result(gemma, [SYSTEM, USER, ANSWER], "turn"), Problem)
    merged, own = result(CHATML, [SYSTEM, USER, ANSWER], "merge"), result(CHATML, [SYSTEM, USER, ANSWER])
    assert isinstance(merged, Tokenized) and isinstance(own, Tokenized) and merged.tokens.tolist() != own.tokens.tolist()
