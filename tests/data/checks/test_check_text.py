"""Text that was decoded with the wrong encoding, paths inside rows, and duplicate rows."""

import json
from typing import Any
from unicodedata import category

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.checks.answer_quality import languages_known, open_identifier, rare_languages
from llamahome.data.checks.duplicates import content_key, in_common, near_repeats, repeats, same_letters, sign, word_runs
from llamahome.data.checks.repair_text import as_json, lost_at, misread_at, redecoded, unprintable_at
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.jsonpath import change_strings, path_in, put, rename, show_path, strings, value_at

WELL_READ = (
    "naïve café, garçon, señor, Straße, smörgåsbord, cœur, Łódź, Øresund, İstanbul",
    "„Spaß“, sagte er; „groß“ …",
    "«À la carte» — c’est l’été… déjà ? Où ça ?",
    "“quoted”, ‘single’, 5 £ or 7 €, 20 °C ± 1, ½ cup, © 2020 ®",
    "São Paulo, Ação, coração, MAÇÃ, NÃO É",
    "Привет, мир. Ещё раз.",
    "Γειά σου Κόσμε",
    "你好，世界。こんにちは。안녕하세요",
    "שלום עולם مرحبا بالعالم",
    "🙂 👩‍👩‍👧 🇫🇷",
    "Việt Nam, Đà Nẵng",
)


def misread(text: str, encoding: str) -> str:
    """The text's UTF-8, read as Latin-1 or as Windows-1252 whose holes stay as they are."""
    data = text.encode("utf-8")
    return "".join(
        bytes([b]).decode(encoding) if encoding == "latin-1" or b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(b) for b in data
    )


@pytest.mark.parametrize("text", WELL_READ)
def test_text_that_was_read_well_is_left_alone(text: str) -> None:
    assert misread_at(text) is None and redecoded(text) is None


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", ["Where is the café?", "It’s “there” – now…", "20 °C", "Ещё раз", "Γειά σου", "so 🙂", "garçon déjà où"])
def test_text_that_was_misread_is_found_and_read_again(text: str, encoding: str) -> None:
    once = misread(text, encoding)
    assert misread_at(once) is not None and redecoded(once) == text
    twice = misread(once, encoding)
    assert redecoded(twice) == text


def test_a_repair_that_is_not_certain_is_not_made() -> None:
    assert misread_at("naïve and cafÃ©") == 13 and redecoded("naïve and cafÃ©") is None
    assert redecoded("cafÃ© €") is None, "a euro sign that was read well"


signs = st.sampled_from("aé\u00c3\u00c2\u00a9\u20ac\u2122\u00e2\u0080\u00d0\u0178 ")


@settings(deadline=None, max_examples=300)
@given(st.text(signs, max_size=12))
def test_a_repair_changes_nothing_of_ascii_and_leaves_text(text: str) -> None:
    found = redecoded(text)
    if found is not None:
        assert [c for c in found if c.isascii()] == [c for c in text if c.isascii()]
        assert all(category(c) not in ("Cc", "Cn", "Co", "Cs") for c in found if not c.isascii())
        assert lost_at(found) is None and len(found) < len(text)


def test_a_lost_character_is_found() -> None:
    assert lost_at("caf\ufffd") == 3 and lost_at("café") is None and lost_at("cafe") is None


def test_control_characters_are_found_and_what_lays_out_text_is_not() -> None:
    assert unprintable_at("a\x00") == 1 and unprintable_at("\x1b[31m") == 0 and unprintable_at("é\x7f") == 1
    assert unprintable_at("a\t\n\v\f\r é \u0085") is None


values = st.recursive(
    st.text(max_size=5) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "role", "content"]), inner, max_size=3),
    max_leaves=8,
)
rows = st.dictionaries(st.sampled_from(["messages", "text", "a b"]), values, max_size=3)


@settings(deadline=None, max_examples=100)
@given(rows)
def test_each_string_of_a_row_is_where_its_path_says(row: dict[str, Any]) -> None:
    before = json.dumps(row)
    for steps, text in strings(row):
        assert value_at(row, steps) == text
        assert value_at(put(row, steps, 7), steps) == 7
    changed, changes = change_strings(row, str.upper)
    assert json.dumps(row) == before and len(changes) == sum(text != text.upper() for _, text in strings(row))
    assert [text for _, text in strings(changed)] == [text.upper() for _, text in strings(row)]


def test_the_path_of_a_message_is_told_only_when_the_row_has_it() -> None:
    row = {"messages": [{"role": "user"}], "turn": 1}
    assert show_path(path_in('messages[0].role is "usr"', row) or ()) == "messages[0].role"
    assert path_in('messages[0] has no "content"', row) == ("messages", 0)
    for message in ("messages[1].role is null", "turn 0 (user) contains x", "the row has no messages", "no assistant turn"):
        assert path_in(message, row) is None


def test_a_renamed_key_keeps_its_place_and_its_value() -> None:
    row = {"a": 1, "messages": [{"rol": "user", "content": "x"}]}
    assert json.dumps(rename(row, ("messages", 0, "rol"), "role")) == '{"a": 1, "messages": [{"role": "user", "content": "x"}]}'


def chat(*contents: str, **more: Any) -> Conversation:
    turns = tuple({"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, contents, strict=False))
    return Conversation(Row(0, "a", 1, {}), turns, **more)


def test_what_is_said_and_by_whom_makes_the_key_and_white_space_does_not() -> None:
    one = chat("How are you?", "Fine,  thank\nyou.")
    assert content_key(one) == content_key(chat(" How are you?", "Fine, thank you.\n"))
    assert not same_letters(one, chat(" How are you?", "Fine, thank you.\n")) and same_letters(
        one, chat("How are you?", "Fine,  thank\nyou.")
    )
    others = [
        chat("How are you?Fine, thank you."),
        chat("How are you", "?Fine, thank you."),
        chat("How are you?", "Fine, thank you.", "So?"),
    ]
    others += [
        Conversation(one.row, text="How are you? Fine, thank you."),
        chat("How are you?", "Fine,  thank\nyou.", context_only=frozenset({1})),
    ]
    others.append(Conversation(one.row, ({**one.turns[0]}, {**one.turns[1], "tool_calls": [{"id": "1"}]})))
    assert len({content_key(other) for other in [one, *others]}) == 1 + len(others)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
def test_every_usable_row_but_the_first_of_its_kind_is_a_repeat(found: list[tuple[int, bool]]) -> None:
    hashes, usable = np.array([key for key, _ in found], np.uint64), np.array([good for _, good in found], np.bool_)
    first: dict[int, int] = {}
    expected = []
    for number, (key, good) in enumerate(found):
        if good and first.setdefault(key, number) != number:
            expected.append((number, first[key]))
    assert repeats(hashes, usable) == expected


def test_the_share_of_equal_values_estimates_the_share_of_word_runs_in_common() -> None:
    rng = np.random.default_rng(3)
    off = []
    for number in range(150):
        words = [f"w{word}" for word in rng.integers(0, 10**6, 200)]
        other = list(words)
        for at in rng.integers(0, 200, number % 12):
            other[at] = f"x{at}"
        one, two = " ".join(words), " ".join(other)
        first, second = word_runs(one), word_runs(two)
        off.append(float((sign(one) == sign(two)).mean()) - len(first & second) / len(first | second))
    assert abs(np.mean(off)) < 0.015 and np.std(off) < 0.0625  # 64 draws: at most 1 / (2 * 8)


def test_rows_that_share_most_of_their_words_are_near_and_others_are_not() -> None:
    words = [f"word{number}" for number in range(120)]
    texts = [" ".join(words), " ".join([*words[:118], "other", "end"]), " ".join(reversed(words)), "too short", "too short"]
    signatures = np.stack([sign(text) for text in texts])

    def shared(one: int, other: int) -> float:
        return in_common(texts[one], texts[other])

    assert list(near_repeats(signatures, set(), shared)) == [(1, 0, pytest.approx(114 / 118))]
    assert list(near_repeats(signatures, {1}, shared)) == []
    alike = np.stack([sign(" ".join([*words, str(number)])) for number in range(60)])
    calls: list[int] = []
    assert len(list(near_repeats(alike, set(), lambda one, other: calls.append(one) or 0.9))) == 59
    assert len(calls) <= 3 * 59, "each row is compared with few others, however many are alike"


@pytest.mark.skipif(not languages_known(), reason="the extra `quality` is not installed")
def test_a_clear_text_has_a_language_and_a_short_one_has_none() -> None:
    identify = open_identifier()
    assert identify("The weather is fine today, and we are going to walk through the woods and along the river.") == "en"
    assert identify("Das Wetter ist heute schön, und wir gehen durch den Wald und dann am Fluss entlang nach Hause.") == "de"
    assert identify("Hello") == ""


def test_a_language_is_rare_only_among_many_clear_rows() -> None:
    assert rare_languages(["en"] * 150 + ["de"] + [""] * 500) == ("en", {"de"})
    assert rare_languages(["en"] * 90 + ["de"]) == ("", set())
    assert rare_languages(["en"] * 150 + ["de"] * 10) == ("en", set())


@pytest.mark.parametrize("line", ['{"a": 1},', ',{"a": 1}', ' {"a": 1} , ', '{"a": 1,},', "{'a': 1},"])
def test_a_line_of_an_array_is_its_object(line: str) -> None:
    assert json.loads(as_json(line) or "null") == {"a": 1}


@pytest.mark.parametrize("line", ["[", "],", "[1],", '[{"a": 1},', '{"a": 1}]', '{"a": 1}}', '[{"a": 1}]', '{"a": [1}', '"a",'])
def test_a_line_that_is_no_object_with_commas_around_it_is_left(line: str) -> None:
    assert as_json(line) is None
