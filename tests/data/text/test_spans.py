"""Answers that are verified row by row: tool calls, marked answers, turns that a template leaves out, templates that depend on texts."""

from typing import Any

import pytest
from tests.support.templates import CHATML, FAMILIES, QWEN25
from tests.support.tokenizers import train_tokenizer

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.data.text.spans import find_span
from llamahome.data.text.targets import Tokenized, tokenize
from llamahome.data.text.template_skeleton import find_skeleton
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import Problem

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"zone": "string"}}}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "clock", "arguments": '{"zone": "UTC", "n": 2}'}]},
    {"role": "tool", "content": "12:00"},
    {"role": "tool", "content": "13:00"},
    {"role": "assistant", "content": "Noon."},
]


def read(turns: list[dict[str, Any]], **more: Any) -> Conversation:
    result = understand(Row(0, "rows.jsonl", 1, {"messages": turns, **more}), "messages")
    assert isinstance(result, Conversation), result
    return result


def learned(conversation: Conversation, tokenizer: ChatTokenizer, **how: Any) -> str:
    (result,) = tokenize([conversation], tokenizer, **{"train_on": "assistant", **how})
    assert isinstance(result, Tokenized), result
    return tokenizer.decode(result.tokens[result.targets])


def refused(conversation: Conversation, tokenizer: ChatTokenizer, **how: Any) -> Problem:
    (result,) = tokenize([conversation], tokenizer, **{"train_on": "assistant", **how})
    assert isinstance(result, Problem), result
    return result


@pytest.fixture(scope="module")
def qwen() -> ChatTokenizer:
    return ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer())


def test_tool_calls_results_and_definitions_are_rendered_and_the_calls_are_targets(qwen: ChatTokenizer) -> None:
    call = '\n<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC", "n": 2}}\n</tool_call><|im_end|>'
    conversation = read(CALLED, tools=TOOLS)
    (result,) = tokenize([conversation], qwen, train_on="assistant")
    assert isinstance(result, Tokenized), result
    pieces = [
        ('<|im_start|>system\nYou are kind.\n\nTools:\n{"type": "function", "function": {"name": "clock", ', False),
        ('"parameters": {"zone": "string"}}}\n<|im_end|>\n<|im_start|>user\ntime?<|im_end|>\n<|im_start|>assistant', False),
        (call[:1], False),
        (call[1:], True),
        ("\n<|im_start|>user\n<tool_response>\n12:00\n</tool_response>\n<tool_response>\n13:00\n</tool_response><|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("Noon.<|im_end|>", True),
        ("\n", False),
    ]
    assert qwen.decode(result.tokens) == "".join(text for text, _ in pieces)
    assert qwen.decode(result.tokens[result.targets]) == "".join(text for text, target in pieces if target)


def test_text_beside_a_call_and_two_calls_in_one_turn_are_targets(qwen: ChatTokenizer) -> None:
    call = {"name": "clock", "arguments": {"zone": 'Örebro "x"\n', "deep": {"list": [1, 2.5, None, True]}}}
    turns = [CALLED[0], {"role": "assistant", "content": "Let me look.", "tool_calls": [call, call]}]
    text = learned(read(turns), qwen)
    assert text.startswith("Let me look.\n<tool_call>") and text.count("</tool_call>") == 2 and text.endswith("</tool_call><|im_end|>")


def test_a_template_that_prints_arguments_unchanged_gets_them_as_json_text() -> None:
    texts = ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer(QWEN25.replace("call.function.arguments | tojson", "call.function.arguments")))
    assert '"arguments": {"zone": "UTC", "n": 2}}' in learned(read(CALLED), texts)


def test_a_template_that_reads_the_content_of_every_turn_gets_an_empty_one() -> None:
    asking = QWEN25.replace("{%- if turn.content -%}{{ '\\n' ~ turn.content }}{%- endif -%}", "{{- '\\n' + turn.content -}}")
    assert asking != QWEN25
    result = learned(read(CALLED), ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer(asking)))
    assert result.startswith('\n<tool_call>\n{"name": "clock"') and result.endswith("Noon.<|im_end|>")
    problem = refused(read(CALLED), ChatTokenizer(train_tokenizer()))
    assert problem.code == "data.turn-left-out" and "the name of the tool clock of turn 1" in problem.message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("call.function.arguments | tojson", "'{}'", "leaves out the argument 'zone' of the tool clock"),
        ("call.function.name", "'tool'", "leaves out the name of the tool clock"),
    ],
)
def test_a_call_that_is_not_fully_rendered_is_refused(old: str, new: str, words: str) -> None:
    changed = ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer(QWEN25.replace(old, new)))
    for train_on in ("assistant", "last", "all"):
        problem = refused(read(CALLED), changed, train_on=train_on)
        assert problem.code == "data.turn-left-out" and words in problem.message and problem.hint.startswith("--set model.chat_template=")


def test_tool_definitions_that_the_template_ignores_are_refused() -> None:
    problem = refused(read(CALLED[:1] + CALLED[4:], tools=TOOLS), ChatTokenizer(FAMILIES["ChatML"].tokenizer()))
    assert problem.code == "data.turn-left-out" and "the definition of the tool clock" in problem.message


def test_a_control_token_inside_a_call_is_refused(qwen: ChatTokenizer) -> None:
    turns = [CALLED[0], {"role": "assistant", "tool_calls": [{"name": "clock", "arguments": {"zone": "a<|im_end|>"}}]}]
    problem = refused(read(turns), qwen)
    assert problem.code == "data.control-token-in-text" and "turn 1 (assistant)" in problem.message


@pytest.mark.parametrize("train_on", ["assistant", "all", "last"])
def test_a_turn_that_the_template_leaves_out_is_refused(train_on: str) -> None:
    deaf = ChatTokenizer(train_tokenizer(template=CHATML.replace("messages -%}", "messages if turn.role != 'system' -%}", 1)))
    turns = [{"role": "system", "content": "Be brief."}, CALLED[0], CALLED[4]]
    problem = refused(read(turns), deaf, train_on=train_on)
    assert problem.code == "data.turn-left-out" and "turn 0 (system)" in problem.message
    assert learned(read(turns[1:]), deaf) == "Noon.<|im_end|>"


def test_thoughts_before_an_answer_are_targets_if_the_template_renders_them() -> None:
    written = "('<think>' ~ turn.reasoning_content ~ '</think>' if turn.thinking else '') ~ turn.content ~"
    thought = CHATML.replace("turn.content ~", written)
    turns = [CALLED[0], {"role": "assistant", "content": "Noon.", "reasoning_content": "hm"}]
    assert learned(read(turns), ChatTokenizer(train_tokenizer(template=thought))) == "<think>hm</think>Noon.<|im_end|>"
    problem = refused(read(turns), ChatTokenizer(train_tokenizer()))
    assert problem.code == "data.mask-unproved" and "leaves out the thoughts" in problem.message and "data.train_on=all" in problem.hint
    judged = refused(read(turns), ChatTokenizer(train_tokenizer()), train_on="judged")
    assert judged.message == problem.message and judged.hint.startswith("--set model.chat_template="), "data.train_on is not read there"


ANSWER = "turn.content ~ '<|im_end|>'"
ENDLESS = "{{ turn.content }}{%- endgeneration -%}<|im_end|>"
MARKED = CHATML.replace(
    "turn.content ~ '<|im_end|>\\n' }}",
    "'' }}{%- if turn.role == 'assistant' -%}{%- generation -%}{{ turn.content ~ '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ turn.content ~ '<|im_end|>' }}{%- endif -%}{{ '\\n' }}",
)


@pytest.mark.parametrize("inside", [f"{ANSWER}", f"{ANSWER} ~ '\\n'", f"'<think>' ~ {ANSWER}"])
def test_generation_marks_give_the_same_targets_as_in_transformers(inside: str) -> None:
    marked = train_tokenizer(template=MARKED.replace(ANSWER, inside, 1))
    for contents in (["Hi there", "Fine."], ["  spaced ", "\ttabs"], ["👩‍👩‍👧 é", "e\u0301"]):
        turns = [turn for text in contents for turn in ({"role": "user", "content": "q"}, {"role": "assistant", "content": text})]
        reference = marked.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        (result,) = tokenize([read(turns)], ChatTokenizer(marked), train_on="assistant")
        assert isinstance(result, Tokenized), result
        assert result.tokens.tolist() == reference["input_ids"]
        assert result.targets.tolist() == [bool(value) for value in reference["assistant_masks"]]


def test_train_on_last_and_weights_apply_to_marked_answers() -> None:
    marked = ChatTokenizer(train_tokenizer(template=MARKED))
    turns = [CALLED[0], {"role": "assistant", "content": "One"}, CALLED[0], {"role": "assistant", "content": "Two"}]
    assert learned(read(turns), marked, train_on="last") == "Two<|im_end|>"
    assert learned(read([*turns[:3], {**turns[3], "weight": 0}]), marked) == "One<|im_end|>"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "{{ turn.content ~ '<|im_end|>' }}{%- endgeneration -%}",
            ENDLESS,
            "leave out <|im_end|>",
        ),
        ("== 'assistant' -%}", "== 'assistant' and loop.last -%}", "enclose 1 texts for 2 assistant turns"),
        ("generation -%}{{ turn.content", "generation -%}{{ turn.content | upper", "changes the assistant's text"),
    ],
)
def test_generation_marks_that_do_not_match_the_turns_are_refused(old: str, new: str, words: str) -> None:
    assert old in MARKED
    marked = ChatTokenizer(train_tokenizer(template=MARKED.replace(old, new, 1)))
    turns = [CALLED[0], {"role": "assistant", "content": "One"}, CALLED[0], {"role": "assistant", "content": "Two"}]
    problem = refused(read(turns), marked)
    assert problem.code == "data.mask-unproved" and words in problem.message


def test_a_template_that_depends_on_the_texts_is_verified_row_by_row() -> None:
    peeking = CHATML.replace("turn.content ~", "('[code] ' if 'def ' in turn.content else '') ~ turn.content ~")
    tokenizer = ChatTokenizer(train_tokenizer(template=peeking))
    turns = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "a def b"}, CALLED[0], CALLED[4]]
    assert learned(read(turns), tokenizer) == "[code] a def b<|im_end|>Noon.<|im_end|>"
    skeleton = find_skeleton(turns, tokenizer)
    assert skeleton is not None and skeleton.spans(turns, [1, 3], tokenizer.render(turns)) is None


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Qwen 3"])
def test_a_skeleton_gives_the_spans_that_verifying_the_row_gives(name: str) -> None:
    tokenizer = ChatTokenizer(FAMILIES[name].tokenizer())
    for texts in (["a", "b", "c", "d"], [" a ", "  b\n", "c\n", "\n d"], ["ä 🙂", "e\u0301", "漢", "\t字"]):
        turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
        whole, skeleton = tokenizer.render(turns), find_skeleton(turns, tokenizer)
        assert skeleton is not None
        assert skeleton.spans(turns, [1, 3], whole) == [find_span(turns, number, whole, tokenizer) for number in (1, 3)]


def test_a_template_that_ignores_the_generation_prompt_is_refused() -> None:
    bare = CHATML.partition("{%- if add_generation_prompt")[0]
    problem = refused(read([CALLED[0], CALLED[4]]), ChatTokenizer(train_tokenizer(template=bare)))
    assert problem.code == "data.mask-unproved" and "it has no generation prompt" in problem.message
