"""Answers that no frame knows: tool calls, marked answers, turns that a template leaves out, texts that it looks into."""

from typing import Any

import pytest
from tests.support.templates import CHATML, FAMILIES, QWEN25
from tests.support.tokenizers import train_tokenizer

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.data.text.frames import find_frame
from llamahome.data.text.spans import find_span
from llamahome.data.text.targets import Tokenized, tokenize
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
    found = understand(Row(0, "rows.jsonl", 1, {"messages": turns, **more}), "messages")
    assert isinstance(found, Conversation), found
    return found


def learned(conversation: Conversation, tokenizer: ChatTokenizer, **how: Any) -> str:
    (found,) = tokenize([conversation], tokenizer, **{"train_on": "assistant", **how})
    assert isinstance(found, Tokenized), found
    return tokenizer.decode(found.tokens[found.targets])


def refused(conversation: Conversation, tokenizer: ChatTokenizer, **how: Any) -> Problem:
    (found,) = tokenize([conversation], tokenizer, **{"train_on": "assistant", **how})
    assert isinstance(found, Problem), found
    return found


@pytest.fixture(scope="module")
def qwen() -> ChatTokenizer:
    return ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer())


def test_tool_calls_results_and_definitions_are_written_and_the_calls_learned(qwen: ChatTokenizer) -> None:
    call = '\n<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC", "n": 2}}\n</tool_call><|im_end|>'
    conversation = read(CALLED, tools=TOOLS)
    (found,) = tokenize([conversation], qwen, train_on="assistant")
    assert isinstance(found, Tokenized), found
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
    assert qwen.decode(found.tokens) == "".join(text for text, _ in pieces)
    assert qwen.decode(found.tokens[found.targets]) == "".join(text for text, target in pieces if target)


def test_words_beside_a_call_and_two_calls_at_once_are_learned(qwen: ChatTokenizer) -> None:
    call = {"name": "clock", "arguments": {"zone": 'Örebro "x"\n', "deep": {"list": [1, 2.5, None, True]}}}
    turns = [CALLED[0], {"role": "assistant", "content": "Let me look.", "tool_calls": [call, call]}]
    text = learned(read(turns), qwen)
    assert text.startswith("Let me look.\n<tool_call>") and text.count("</tool_call>") == 2 and text.endswith("</tool_call><|im_end|>")


def test_arguments_go_as_text_to_a_template_that_writes_them_as_they_are() -> None:
    texts = ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer(QWEN25.replace("call.function.arguments | tojson", "call.function.arguments")))
    assert '"arguments": {"zone": "UTC", "n": 2}}' in learned(read(CALLED), texts)


def test_an_empty_content_goes_to_a_template_that_asks_every_turn_for_it() -> None:
    asking = QWEN25.replace("{%- if turn.content -%}{{ '\\n' ~ turn.content }}{%- endif -%}", "{{- '\\n' + turn.content -}}")
    assert asking != QWEN25
    found = learned(read(CALLED), ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer(asking)))
    assert found.startswith('\n<tool_call>\n{"name": "clock"') and found.endswith("Noon.<|im_end|>")
    problem = refused(read(CALLED), ChatTokenizer(train_tokenizer()))
    assert problem.code == "data.turn-left-out" and "the name of the tool clock of turn 1" in problem.message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("call.function.arguments | tojson", "'{}'", "leaves out the argument 'zone' of the tool clock"),
        ("call.function.name", "'tool'", "leaves out the name of the tool clock"),
    ],
)
def test_a_call_that_is_not_written_whole_is_refused(old: str, new: str, words: str) -> None:
    changed = ChatTokenizer(FAMILIES["Qwen 2.5"].tokenizer(QWEN25.replace(old, new)))
    for train_on in ("assistant", "last", "all"):
        problem = refused(read(CALLED), changed, train_on=train_on)
        assert problem.code == "data.turn-left-out" and words in problem.message and "chat_template" in str(problem.hint)


def test_definitions_that_the_template_does_not_know_are_refused() -> None:
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


def test_thoughts_beside_an_answer_are_learned_where_the_template_writes_them() -> None:
    written = "('<think>' ~ turn.reasoning_content ~ '</think>' if turn.thinking else '') ~ turn.content ~"
    thought = CHATML.replace("turn.content ~", written)
    turns = [CALLED[0], {"role": "assistant", "content": "Noon.", "reasoning_content": "hm"}]
    assert learned(read(turns), ChatTokenizer(train_tokenizer(template=thought))) == "<think>hm</think>Noon.<|im_end|>"
    problem = refused(read(turns), ChatTokenizer(train_tokenizer()))
    assert problem.code == "data.mask-unproved" and "leaves out the thoughts" in problem.message


ANSWER = "turn.content ~ '<|im_end|>'"
ENDLESS = "{{ turn.content }}{%- endgeneration -%}<|im_end|>"
MARKED = CHATML.replace(
    "turn.content ~ '<|im_end|>\\n' }}",
    "'' }}{%- if turn.role == 'assistant' -%}{%- generation -%}{{ turn.content ~ '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ turn.content ~ '<|im_end|>' }}{%- endif -%}{{ '\\n' }}",
)


@pytest.mark.parametrize("inside", [f"{ANSWER}", f"{ANSWER} ~ '\\n'", f"'<think>' ~ {ANSWER}"])
def test_marks_of_generation_decide_as_they_do_in_transformers(inside: str) -> None:
    marked = train_tokenizer(template=MARKED.replace(ANSWER, inside, 1))
    for contents in (["Hi there", "Fine."], ["  spaced ", "\ttabs"], ["👩‍👩‍👧 é", "e\u0301"]):
        turns = [turn for text in contents for turn in ({"role": "user", "content": "q"}, {"role": "assistant", "content": text})]
        reference = marked.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        (found,) = tokenize([read(turns)], ChatTokenizer(marked), train_on="assistant")
        assert isinstance(found, Tokenized), found
        assert found.tokens.tolist() == reference["input_ids"]
        assert found.targets.tolist() == [bool(value) for value in reference["assistant_masks"]]


def test_of_marked_answers_the_last_alone_or_those_of_weight_one() -> None:
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
        ("== 'assistant' -%}", "== 'assistant' and loop.last -%}", "enclose 1 stretches for 2 assistant turns"),
        ("generation -%}{{ turn.content", "generation -%}{{ turn.content | upper", "changes the assistant's text"),
    ],
)
def test_marks_that_are_not_the_turns_and_their_ends_are_refused(old: str, new: str, words: str) -> None:
    assert old in MARKED
    marked = ChatTokenizer(train_tokenizer(template=MARKED.replace(old, new, 1)))
    turns = [CALLED[0], {"role": "assistant", "content": "One"}, CALLED[0], {"role": "assistant", "content": "Two"}]
    problem = refused(read(turns), marked)
    assert problem.code == "data.mask-unproved" and words in problem.message


def test_a_template_that_looks_into_the_texts_is_proved_row_by_row() -> None:
    peeking = CHATML.replace("turn.content ~", "('[code] ' if 'def ' in turn.content else '') ~ turn.content ~")
    tokenizer = ChatTokenizer(train_tokenizer(template=peeking))
    turns = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "a def b"}, CALLED[0], CALLED[4]]
    assert learned(read(turns), tokenizer) == "[code] a def b<|im_end|>Noon.<|im_end|>"
    frame = find_frame(turns, tokenizer)
    assert frame is not None and frame.spans(turns, [1, 3], tokenizer.render(turns)) is None


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Qwen 3"])
def test_a_frame_says_what_a_proof_of_the_row_itself_says(name: str) -> None:
    tokenizer = ChatTokenizer(FAMILIES[name].tokenizer())
    for texts in (["a", "b", "c", "d"], [" a ", "  b\n", "c\n", "\n d"], ["ä 🙂", "e\u0301", "漢", "\t字"]):
        turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
        whole, frame = tokenizer.render(turns), find_frame(turns, tokenizer)
        assert frame is not None
        assert frame.spans(turns, [1, 3], whole) == [find_span(turns, number, whole, tokenizer) for number in (1, 3)]


def test_a_template_that_ignores_the_generation_prompt_is_refused() -> None:
    bare = CHATML.partition("{%- if add_generation_prompt")[0]
    problem = refused(read([CALLED[0], CALLED[4]]), ChatTokenizer(train_tokenizer(template=bare)))
    assert problem.code == "data.mask-unproved" and "asked for the beginning of an answer it writes none" in problem.message
