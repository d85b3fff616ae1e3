"""What a template rendered up to a question is read back to the same turns, and what it did not render is not."""

import pytest
from tests.support.templates import FAMILIES

from llamahome.data.text.tokens import ChatTokenizer
from llamahome.data.text.unrendered import turns_of

SYSTEM = ("system", "Be brief.\nAnd kind.")
CHATS = (
    (("user", "2+2?"),),
    (("user", "Two\n\nlines, and <b>marks</b>: {x} (.*?)"),),
    (("user", "2+2?"), ("assistant", "4"), ("user", "Why?")),
    (SYSTEM, ("user", "2+2?")),
    (SYSTEM, ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")),
)
WITHIN_THE_QUESTION = ("Llama 2", "Mistral")
"""They write a system text so that it may as well be the beginning of the question."""
TOKENIZERS = {name: ChatTokenizer(family.tokenizer()) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_rendered_question_is_read_back(name: str, chat: tuple[tuple[str, str], ...]) -> None:
    tokenizer = TOKENIZERS[name]
    turns = [{"role": role, "content": text} for role, text in chat if FAMILIES[name].system or role != "system"]
    for prompt in (True, False):
        text = tokenizer.render(turns, add_generation_prompt=prompt)
        found = turns_of(text, tokenizer)
        assert found is not None and tokenizer.render(found, add_generation_prompt=prompt) == text
        if turns[0]["role"] == "user" or name not in WITHIN_THE_QUESTION:
            assert found == turns, (text, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_exactly_the_template_is_not_read(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    question = [{"role": "user", "content": "2+2?"}]
    text = tokenizer.render(question, add_generation_prompt=True)
    for other in ("", "2+2?", f"{text}4", f"x{text}", text[: len(text) // 2]):
        found = turns_of(other, tokenizer)
        assert found is None or tokenizer.render(found, add_generation_prompt=True) == other, (other, found)
    foreign = next(each for other, each in TOKENIZERS.items() if each.render(question) != tokenizer.render(question))
    other = foreign.render(question)
    found = turns_of(other, tokenizer)
    assert found is None or tokenizer.render(found) == other, (other, found)


def test_marks_within_a_question_are_not_taken_for_turns_that_are_not_there() -> None:
    tokenizer = TOKENIZERS["Zephyr"]  # its marks are no control tokens
    text = tokenizer.render([{"role": "user", "content": "a<|user|>b"}], add_generation_prompt=True)
    found = turns_of(text, tokenizer)
    assert found is None or tokenizer.render(found, add_generation_prompt=True) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_long_chats_are_read_back_or_not_without_trying_all_places_of_their_marks(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(30) for role in ("user", "assistant")][:-1]
    text = tokenizer.render(turns, add_generation_prompt=True)
    assert turns_of(text, tokenizer) == turns
    other = turns_of(f"{text}x", tokenizer)
    assert other is None or tokenizer.render(other) == f"{text}x"
