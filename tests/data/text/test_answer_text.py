"""Streamed text is the decoded text, cut at the first stop string, however the tokens are cut."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import train_tokenizer

from llamahome.data.text.answer_text import AnswerText
from llamahome.data.text.tokens import ChatTokenizer

TOKENIZER = ChatTokenizer(train_tokenizer())
TEXTS = st.text(alphabet=st.sampled_from([*"abc \n<|>", "é", "漢", "🙂", "\u200d"]), max_size=30)


def streamed(ids: list[int], stops: list[str]) -> tuple[list[str], AnswerText]:
    text = AnswerText(TOKENIZER.decode, stops)
    parts = []
    for number in ids:
        parts.append(text.add([number]))
        if text.stopped:
            break
    return [*parts, text.end()], text


@settings(max_examples=150, deadline=None)
@given(whole=TEXTS, stops=st.lists(st.text(alphabet="ab é🙂<", min_size=1, max_size=4), max_size=3))
def test_the_parts_are_the_text_before_the_stop_string_that_is_complete_first(whole: str, stops: list[str]) -> None:
    parts, text = streamed(TOKENIZER.encode_ids([whole])[0], stops)
    assert "".join(parts) == text.text and not any(stop in text.text for stop in stops)
    assert text.stopped == any(stop in whole for stop in stops)
    rest = whole.removeprefix(text.text)
    assert whole == text.text + rest and (rest.startswith(tuple(stops)) if text.stopped else rest == "")


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(4, 300), max_size=25))
def test_without_stop_strings_the_parts_are_what_the_tokens_decode_to_and_never_half_a_character(ids: list[int]) -> None:
    parts, text = streamed(ids, [])
    assert text.text == TOKENIZER.decode(ids)
    assert not any(part.endswith("\ufffd") for part in parts[:-1])


def test_text_that_cannot_become_a_stop_string_is_given_out_at_once() -> None:
    text = AnswerText(TOKENIZER.decode, ["\n\nUser:"])
    assert text.add(TOKENIZER.encode_ids(["a cat"])[0]) == "a cat"
    assert text.add(TOKENIZER.encode_ids(["\n\nUs"])[0]) == "" and text.add(TOKENIZER.encode_ids(["e it"])[0]) == "\n\nUse it"
