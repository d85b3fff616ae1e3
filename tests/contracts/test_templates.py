"""On the chat template of every family, tokens and targets are those of an oracle that writes the chat by hand, piece by piece."""

import datetime
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.templates import FAMILIES, Family, Pieces, Turn

from llamahome.data.records import Conversation, Row
from llamahome.data.text.targets import Tokenized, tokenize
from llamahome.data.text.template_skeleton import find_skeleton
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import Problem

CHATS: dict[str, list[Turn]] = {
    "one turn": [("user", "What is the capital of France?"), ("assistant", "Paris.")],
    "two turns": [("user", "Hello"), ("assistant", "Hi there"), ("user", "And you?"), ("assistant", "Fine, thank you.")],
    "system": [("system", "You are brief."), ("user", "Hello"), ("assistant", "Hi")],
    "system and turns": [("system", "Be\nbrief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")],
    "unicode": [("user", "smile 🙂 ｅ́"), ("assistant", "👩‍👩‍👧 ok 🇫🇷 é ü 漢字 e\u0301")],
    "spaces": [("user", "  a "), ("assistant", "  answer  ")],
    "newlines": [("user", "\nq\n"), ("assistant", "\n\n  code:\n    x\n")],
    "tabs": [("user", "q"), ("assistant", "\tx\t")],
    "same text": [("user", "yes"), ("assistant", "yes"), ("user", "yes"), ("assistant", "yes")],
    "like a skeleton": [("user", "INST] user\n assistant"), ("assistant", "assistant\n<|model|> think\n\n")],
}
_MADE: dict[str, ChatTokenizer] = {}


def made(name: str) -> ChatTokenizer:
    if name not in _MADE:
        _MADE[name] = ChatTokenizer(FAMILIES[name].tokenizer())
    return _MADE[name]


def conversation(turns: list[Turn], **more: Any) -> Conversation:
    listed = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(Row(0, "rows.jsonl", 1, {"messages": list(listed)}), listed, **more)


def result(name: str, turns: list[Turn], *, train_on: str = "assistant", **more: Any) -> Tokenized | Problem:
    (found,) = tokenize([conversation(turns, **more)], made(name), train_on=train_on)
    return found


def oracle(family: Family, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """Tokens and targets of pieces of text, by transformers alone: of the whole text, cut in stretches only where a token straddles one."""
    reference = family.tokenizer()
    joined = [("".join(text for text, _ in group), learned) for learned, group in itertools.groupby(pieces, key=lambda piece: piece[1])]
    whole = reference("".join(text for text, _ in joined), add_special_tokens=False, return_offsets_mapping=True)
    tokens = reference.convert_ids_to_tokens(whole["input_ids"])
    begins, targets, at = [begin for begin, _ in whole["offset_mapping"]], [False] * len(tokens), 0
    for text, learned in joined:
        inside = [number for number, begin in enumerate(begins) if at <= begin < at + len(text)]
        last = inside[-1]
        end = begins[last] + len(tokens[last]) if tokens[last] in family.special else whole["offset_mapping"][last][1]
        if learned and (begins[inside[0]] != at or end != at + len(text)):
            ids = [inner(reference, text, family) for text, _ in joined]
            return [number for part in ids for number in part], [
                learned for part, (_, learned) in zip(ids, joined, strict=True) for _ in part
            ]
        targets[inside[0] : last + 1] = [learned] * len(inside)
        at += len(text)
    return whole["input_ids"], targets


def inner(reference: Any, text: str, family: Family) -> list[int]:
    """Tokens of a text that stands inside another: SentencePiece would put a space before it, so a letter goes before it and away again."""
    if not family.sentencepiece or text.startswith("<"):
        return list(reference(text, add_special_tokens=False)["input_ids"])
    ids = list(reference("a" + text, add_special_tokens=False)["input_ids"])
    assert ids[0] == reference("a", add_special_tokens=False)["input_ids"][0]
    return ids[1:]


def refused_by(name: str, turns: list[Turn]) -> str | None:
    """The code with which the family must refuse the chat, None when it must be learned."""
    if not FAMILIES[name].system and not FAMILIES[name].merges and turns[0][0] == "system":
        return "data.template-refused"
    answers = [content for role, content in turns if role == "assistant"]
    return "data.mask-unproved" if name == "Qwen 3" and len(answers) > 1 else None


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_targets_are_the_oracles(name: str, chat: str) -> None:
    turns = CHATS[chat]
    found = result(name, turns)
    if refused_by(name, turns) is not None:
        assert isinstance(found, Problem) and found.code == refused_by(name, turns)
        return
    assert isinstance(found, Tokenized), found
    pieces = FAMILIES[name].pieces(turns)
    ids, targets = oracle(FAMILIES[name], pieces)
    assert found.tokens.tolist() == ids
    assert found.targets.tolist() == targets


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rendering_is_transformers_own(name: str) -> None:
    for turns in CHATS.values():
        listed = [{"role": role, "content": content} for role, content in turns]
        if "date" in name or (not FAMILIES[name].system and turns[0][0] == "system"):
            continue
        for prompt in (False, True):
            reference = FAMILIES[name].tokenizer().apply_chat_template(listed, tokenize=False, add_generation_prompt=prompt)
            assert made(name).render(listed, add_generation_prompt=prompt) == reference


@pytest.mark.parametrize("name", FAMILIES)
def test_the_skeleton_gives_the_spans_of_a_chat_so_that_it_renders_once(name: str) -> None:
    for chat in ("one turn", "two turns", "system and turns", "unicode", "spaces", "newlines", "like a skeleton"):
        turns = CHATS[chat]
        listed = [{"role": role, "content": content} for role, content in turns]
        if refused_by(name, turns) is None and not (name == "Qwen 3" and chat == "newlines"):
            skeleton = find_skeleton(listed, made(name))
            numbers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
            assert skeleton is not None and skeleton.spans(listed, numbers, made(name).render(listed)) is not None


words = st.text(st.characters(exclude_categories=["Cs", "Co"], exclude_characters="<>[]|\0"), min_size=1, max_size=20).filter(str.strip)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.tuples(words, words), min_size=1, max_size=3), st.none() | words)
def test_what_is_learned_are_the_answers_and_their_ends(name: str, pairs: list[tuple[str, str]], system: str | None) -> None:
    turns: list[Turn] = [] if system is None else [("system", system)]
    turns += [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    found = result(name, turns)
    if refused_by(name, turns) is not None:
        assert isinstance(found, Problem) and found.code == refused_by(name, turns)
        return
    assert isinstance(found, Tokenized), found
    pieces = FAMILIES[name].pieces(turns)
    learned = "".join(text for text, target in pieces if target)
    if FAMILIES[name].sentencepiece:  # it writes a space of its own after a control token and takes the first one away
        assert "".join(made(name).decode(found.tokens[found.targets]).split()) == "".join(learned.split())
    else:
        assert made(name).decode(found.tokens[found.targets]) == learned
    ends = {made(name).added_tokens[made(name).turn_end or ""]}
    assert sum(int(token) in ends for token in found.tokens[found.targets]) == len(pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_is_learned_although_it_is_the_padding_too_and_no_beginning_is_doubled(name: str) -> None:
    found = result(name, CHATS["one turn"])
    tokenizer = made(name)
    assert isinstance(found, Tokenized) and tokenizer.turn_end is not None
    end = tokenizer.added_tokens[tokenizer.turn_end]
    assert found.targets[np.flatnonzero(found.tokens == end)[-1]]
    if tokenizer.bos_id is not None and name != "Zephyr":
        assert found.tokens[0] == tokenizer.bos_id and found.tokens.tolist().count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_answer_alone(name: str) -> None:
    turns = CHATS["two turns"]
    found = result(name, turns, train_on="last")
    assert isinstance(found, Tokenized), found
    last = [text for text, learned in FAMILIES[name].pieces(turns) if learned][-1]
    assert made(name).decode(found.tokens[found.targets]).strip() == last.strip()


def test_history_without_its_thoughts_is_refused_with_the_way_out_and_the_last_answer_is_learned() -> None:
    thinking: list[Turn] = [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb")]
    turns = [*thinking, ("user", "c"), ("assistant", "<think>so</think>d")]
    refused = result("Qwen 3", turns)
    assert isinstance(refused, Problem) and refused.code == "data.mask-unproved" and "later turns follow" in refused.message
    assert "--set data.train_on=last" in str(refused.hint)
    for chat, learned in ((thinking, "<think>\nhm\n</think>\n\nb<|im_end|>"), (turns, "<think>\nso\n</think>\n\nd<|im_end|>")):
        found = result("Qwen 3", chat, train_on="last")
        assert isinstance(found, Tokenized)
        assert made("Qwen 3").decode(found.tokens[found.targets]) == learned
    assert "hm" not in made("Qwen 3").decode(found.tokens)


def test_a_date_stands_still() -> None:
    tokenizer = made("Llama 3 with a date")
    assert tokenizer.template.shows_date and not made("Llama 3").template.shows_date
    listed = [{"role": "user", "content": "a"}]
    assert "Today Date: 01 Jan 2025" in tokenizer.render(listed)
    today = datetime.date.today().strftime("%d %b %Y")
    assert today in tokenizer.decode(tokenizer.encode_prompt(listed))
