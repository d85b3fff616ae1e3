"""Targets compared with ChatML token ids that are composed by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import CHATML, save_tokenizer, train_tokenizer

from llamahome.data.records import Conversation, Row
from llamahome.data.text.targets import Encoded, Tokenized, encode, tokenize
from llamahome.data.text.tokens import ChatTokenizer, load_tokenizer
from llamahome.errors import DataError, Problem

START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def chat(*turns: tuple[str, str], context_only: frozenset[int] = frozenset()) -> Conversation:
    listed = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(Row(0, "rows.jsonl", 1, {"messages": list(listed)}), listed, context_only=context_only)


def plain(text: str) -> Conversation:
    return Conversation(Row(0, "rows.jsonl", 1, {"text": text}), text=text)


def one(conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: str = "assistant") -> Tokenized:
    (result,) = tokenize([conversation], tokenizer, train_on=train_on)
    assert isinstance(result, Tokenized), result
    return result


def refused(conversation: Conversation, tokenizer: ChatTokenizer, *, train_on: str = "assistant") -> Problem:
    (result,) = tokenize([conversation], tokenizer, train_on=train_on)
    assert isinstance(result, Problem)
    return result


def oracle(turns: list[tuple[str, str]], tokenizer: ChatTokenizer, learned: set[int]) -> tuple[list[int], list[bool]]:
    """ChatML from pieces: no rendering, no offsets; each piece tokenized alone."""
    ids: list[int] = []
    mask: list[bool] = []
    for number, (role, content) in enumerate(turns):
        for text, target in ((f"{START}{role}\n", False), (content + END, number in learned), ("\n", False)):
            piece = tokenizer.encode([text])[0].ids.tolist()
            ids += piece
            mask += [target] * len(piece)
    return ids, mask


CHATS = {
    "one turn": [("user", "What is the capital of France?"), ("assistant", "Paris.")],
    "two turns": [("user", "Hello"), ("assistant", "Hi there"), ("user", "And you?"), ("assistant", "Fine, thank you.")],
    "system": [("system", "You are brief."), ("user", "Hello"), ("assistant", "Hi")],
    "emoji": [("user", "smile 🙂"), ("assistant", "👩‍👩‍👧 ok 🇫🇷 é ü 漢字")],
    "combining": [("user", "e\u0301"), ("assistant", "e\u0301 and é differ")],
    "ends in user": [("user", "Hello"), ("assistant", "Hi"), ("user", "unanswered")],
    "tool": [("user", "time?"), ("assistant", "call clock"), ("tool", "12:00"), ("assistant", "Noon.")],
    "same text twice": [("user", "yes"), ("assistant", "yes"), ("user", "yes"), ("assistant", "yes")],
    "trailing space": [("user", "a"), ("assistant", "answer  ")],
}


@pytest.mark.parametrize("turns", CHATS.values(), ids=CHATS.keys())
def test_targets_equal_chatml_written_by_hand(turns: list[tuple[str, str]], tokenizer: ChatTokenizer) -> None:
    learned = {number for number, (role, _) in enumerate(turns) if role == "assistant"}
    ids, mask = oracle(turns, tokenizer, learned)
    result = one(chat(*turns), tokenizer)
    assert result.tokens.tolist() == ids
    assert result.targets.tolist() == mask


@pytest.mark.parametrize("content", ["\nanswer", "  answer", "\n\n  code\n", "\tx", " \n y"])
def test_white_space_around_an_answer_is_learned_and_nothing_before_it(content: str, tokenizer: ChatTokenizer) -> None:
    result = one(chat(("user", "q"), ("assistant", content)), tokenizer)
    assert tokenizer.decode(result.tokens[result.targets]) == content + END
    assert tokenizer.decode(result.tokens) == f"{START}user\nq{END}\n{START}assistant\n{content}{END}\n"


letters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>\0"), min_size=1, max_size=30).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(letters, letters), min_size=1, max_size=3))
def test_decoded_targets_are_the_answers_and_their_ends(pairs: list[tuple[str, str]]) -> None:
    tokenizer = _shared()
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    result = one(chat(*turns), tokenizer)
    assert tokenizer.decode(result.tokens[result.targets]) == "".join(answer + END for _, answer in pairs)
    assert not result.targets[0]


_SHARED: list[ChatTokenizer] = []


def _shared() -> ChatTokenizer:
    if not _SHARED:
        _SHARED.append(ChatTokenizer(train_tokenizer()))
    return _SHARED[0]


def test_train_on_last_learns_only_the_last_answer(tokenizer: ChatTokenizer) -> None:
    result = one(chat(*CHATS["two turns"]), tokenizer, train_on="last")
    assert tokenizer.decode(result.tokens[result.targets]) == "Fine, thank you." + END


def test_train_on_all_learns_every_token_but_the_first(tokenizer: ChatTokenizer) -> None:
    result = one(chat(*CHATS["two turns"]), tokenizer, train_on="all")
    assert result.targets[1:].all() and not result.targets[0]
    assert result.tokens.tolist() == one(chat(*CHATS["two turns"]), tokenizer).tokens.tolist()


def test_a_turn_that_is_context_only_is_not_learned(tokenizer: ChatTokenizer) -> None:
    result = one(chat(*CHATS["two turns"], context_only=frozenset({1})), tokenizer)
    assert tokenizer.decode(result.tokens[result.targets]) == "Fine, thank you." + END


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<pad>"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_control_token_inside_a_text_is_refused(token: str, side: int, tokenizer: ChatTokenizer) -> None:
    texts = ["question", "answer"]
    texts[side] += f" {token} tail"
    problem = refused(chat(("user", texts[0]), ("assistant", texts[1])), tokenizer)
    assert problem.code == "data.control-token-in-text"
    assert token in problem.message and f"turn {side}" in problem.message and problem.where == "rows.jsonl:1"


def test_a_template_without_an_end_token_gets_the_end_of_text_after_the_last_turn() -> None:
    template = (
        "{% for t in messages %}{{ t.role ~ ': ' ~ t.content ~ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    bare = ChatTokenizer(train_tokenizer(template=template))
    result = one(chat(*CHATS["two turns"]), bare)
    assert bare.decode(result.tokens[result.targets]) == "Hi thereFine, thank you." + END
    assert bare.decode(result.tokens).endswith("assistant: Fine, thank you." + END)
    assert one(chat(*CHATS["two turns"]), bare, train_on="all").tokens[-1] == bare.eos_id


def test_space_before_an_answer_and_before_its_end_belongs_to_the_target() -> None:
    template = "{% for t in messages %}{% if t.role == 'user' %}[Q] {{ t.content }} [A]"
    template += "{% else %} {{ t.content }} <|im_end|>{% endif %}{% endfor %}"
    spaced = ChatTokenizer(train_tokenizer(template=template))
    result = one(chat(*CHATS["two turns"]), spaced)
    assert spaced.decode(result.tokens[result.targets]) == " Hi there <|im_end|> Fine, thank you. <|im_end|>"


def test_a_token_that_straddles_the_border_is_cut_there() -> None:
    template = "{% for t in messages %}{{ 'U ' if t.role == 'user' else 'the c' }}{{ t.content }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}the c{% endif %}"
    )
    straddling = ChatTokenizer(train_tokenizer(template=template))
    assert len(straddling.encode(["the cat"])[0].ids) < len(straddling.encode(["the c"])[0].ids) + len(straddling.encode(["at"])[0].ids)
    result = one(chat(("user", "x"), ("assistant", "at sat")), straddling)
    assert straddling.decode(result.tokens[result.targets]) == "at sat" + END


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_reason() -> None:
    template = (
        "{% for t in messages %}<|im_start|>{{ t.role }}\n{{ t.content if loop.last else t.content | upper }}<|im_end|>\n{% endfor %}"
    )
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    problem = refused(chat(*CHATS["two turns"]), ChatTokenizer(train_tokenizer(template=template)))
    assert problem.code == "data.mask-unproved" and "later turns" in problem.message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'"), "generation prompt"),
        (CHATML.replace("turn.content ~", "turn.content | replace('i', 'y') ~"), "changes the assistant's text"),
        (CHATML.replace("turn.content ~ '<|im_end|>", "turn.content ~ ' ### <|im_end|>"), "not a token that ends a turn"),
    ],
)
def test_a_template_that_hides_the_answer_is_refused_with_the_reason(template: str, words: str) -> None:
    problem = refused(chat(("user", "q"), ("assistant", "hi")), ChatTokenizer(train_tokenizer(template=template)))
    assert problem.code == "data.mask-unproved" and words in problem.message and problem.hint


def test_what_the_template_refuses_is_a_problem_of_that_row() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}" + CHATML
    strict = ChatTokenizer(train_tokenizer(template=template))
    problem = refused(chat(*CHATS["system"]), strict)
    assert problem.code == "data.template-refused" and "no system turns here" in problem.message
    assert isinstance(tokenize([chat(*CHATS["one turn"])], strict, train_on="assistant")[0], Tokenized)


@pytest.mark.parametrize(
    ("turns", "condition", "words"),
    [
        ((("user", "a"), ("user", "b"), ("assistant", "c")), "messages[0].role == messages[1].role", "roles must alternate"),
        ((("user", "a"), ("tool", "b"), ("assistant", "c")), "messages[1].role == 'tool'", "only user and assistant"),
    ],
)
def test_a_refusal_that_no_setting_avoids_quotes_the_template_and_the_turns_without_a_hint(
    turns: tuple[tuple[str, str], ...], condition: str, words: str
) -> None:
    strict = ChatTokenizer(train_tokenizer(template=f"{{% if {condition} %}}{{{{ raise_exception('{words}') }}}}{{% endif %}}" + CHATML))
    problem = refused(chat(*turns), strict)
    assert problem.code == "data.template-refused" and problem.hint is None
    assert words in problem.message and problem.message.endswith(", ".join(role for role, _ in turns))


def test_a_template_that_writes_a_beginning_of_text_gets_no_second_one() -> None:
    doubled = ChatTokenizer(train_tokenizer(template="<|endoftext|>" + CHATML, adds_bos=True))
    result = one(chat(*CHATS["one turn"]), doubled)
    assert result.tokens.tolist().count(doubled.bos_id) == 1 and result.tokens[0] == doubled.bos_id


@pytest.mark.parametrize("adds_bos", [False, True])
def test_all_of_a_plain_text_and_its_end_are_targets(adds_bos: bool) -> None:
    tokenizer = ChatTokenizer(train_tokenizer(template=None, adds_bos=adds_bos))
    result = one(plain("The cat sat."), tokenizer)
    assert tokenizer.decode(result.tokens) == ("<|endoftext|>" if adds_bos else "") + "The cat sat." + END
    assert result.targets[1:].all() and not result.targets[0]
    again = one(plain(tokenizer.decode(result.tokens)), tokenizer)
    assert again.tokens.tolist() == result.tokens.tolist()


def test_truncation_counts_the_tokens_and_targets_that_it_cuts(tokenizer: ChatTokenizer) -> None:
    conversation = chat(*CHATS["two turns"])
    whole = one(conversation, tokenizer)
    for length in range(8, len(whole.tokens) + 2):
        (result,) = encode([conversation], tokenizer, train_on="assistant", max_length=length, on_overlong="truncate")
        assert isinstance(result, Encoded)
        (example,) = result.examples
        assert example.tokens.tolist() == whole.tokens[:length].tolist()
        assert example.cut == max(0, len(whole.tokens) - length)
        assert example.cut_targets + example.targets.sum() == whole.targets.sum()
        assert result.outcome == ("truncated" if example.cut else "whole")


def test_drop_removes_a_long_row_and_error_names_its_length(tokenizer: ChatTokenizer) -> None:
    conversation = chat(*CHATS["two turns"])
    length = len(one(conversation, tokenizer).tokens)
    (dropped,) = encode([conversation], tokenizer, train_on="assistant", max_length=8, on_overlong="drop")
    assert isinstance(dropped, Encoded) and dropped.examples == () and dropped.num_tokens == length
    for on_overlong in ("error", "split"):
        (problem,) = encode([conversation], tokenizer, train_on="assistant", max_length=8, on_overlong=on_overlong)
        assert isinstance(problem, Problem) and problem.code == "data.overlong" and problem.hint == f"--set data.max_length={length}"


def test_the_parts_of_a_split_text_are_the_text_and_their_first_tokens_are_no_targets(tokenizer: ChatTokenizer) -> None:
    text = plain("The cat sat on the mat. " * 5)
    whole = one(text, tokenizer)
    (result,) = encode([text], tokenizer, train_on="assistant", max_length=8, on_overlong="split")
    assert isinstance(result, Encoded) and result.outcome == "split"
    assert np.concatenate([example.tokens for example in result.examples]).tolist() == whole.tokens.tolist()
    assert all(len(example.tokens) <= 8 and not example.targets[0] for example in result.examples)


def test_the_texts_of_tokens_join_to_the_text_even_inside_characters(tokenizer: ChatTokenizer) -> None:
    result = one(chat(*CHATS["emoji"]), tokenizer)
    assert "".join(tokenizer.texts(result.tokens.tolist())) == tokenizer.decode(result.tokens)


def test_end_tokens_are_found_from_the_template(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    assert tokenizer.end_ids == (tokenizer.added_tokens[END],)
    other = ChatTokenizer(train_tokenizer(template=CHATML.replace("im_end", "endoftext")))
    assert other.end_ids == (other.added_tokens["<|endoftext|>"], other.added_tokens[END])
    assert tokenizer.encode_prompt([{"role": "user", "content": "hi"}])[-1] == tokenizer.encode(["\n"])[0].ids[-1]


def test_targets_agree_with_transformers_own_mask_of_a_template_with_generation_marks() -> None:
    marked = train_tokenizer(
        template="{% for t in messages %}{{ '<|im_start|>' ~ t.role ~ '\n' }}{% if t.role == 'assistant' %}"
        "{%- generation -%}{{ t.content ~ '<|im_end|>' }}{%- endgeneration -%}{% else %}{{ t.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for turns in CHATS.values():
        listed = [{"role": role, "content": content} for role, content in turns]
        reference = marked.apply_chat_template(listed, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        result = one(chat(*turns), ChatTokenizer(marked))
        assert result.tokens.tolist() == reference["input_ids"]
        assert result.targets.tolist() == [bool(value) for value in reference["assistant_masks"]]


def test_a_prompt_that_has_no_template_or_that_it_refuses_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"data\.no-chat-template"):
        ChatTokenizer(train_tokenizer(template=None)).encode_prompt([{"role": "user", "content": "hi"}])
    strict = ChatTokenizer(train_tokenizer(template="{{ raise_exception('never') }}"))
    assert strict.end_ids == (strict.eos_id,)
    with pytest.raises(DataError, match="never"):
        strict.encode_prompt([{"role": "user", "content": "hi"}])
