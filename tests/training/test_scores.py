"""Scores of answers equal independent references, work in every script, and a user's function is checked on every row."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.errors import ConfigError
from llamahome.training.scores import BUILT_IN, common_subsequence, open_metric

WORDS = st.lists(st.sampled_from(["one", "two", "three", "four", "five"]), max_size=9)
TEXTS = st.text(max_size=40)


def score(name: str, answer: str, reference: str) -> float:
    return open_metric(name).score("a prompt", answer, reference)


def naive_subsequence(first, second) -> int:
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + naive_subsequence(first[:-1], second[:-1])
    return max(naive_subsequence(first[:-1], second), naive_subsequence(first, second[:-1]))


@given(WORDS, WORDS)
def test_the_common_subsequence_is_the_longest(first: list[str], second: list[str]) -> None:
    assert common_subsequence(first, second) == naive_subsequence(tuple(first), tuple(second))


@given(WORDS, WORDS)
def test_rouge_is_the_f_measure_of_the_common_subsequence(first: list[str], second: list[str]) -> None:
    shared = naive_subsequence(tuple(first), tuple(second))
    precision, recall = (shared / len(words) if words else 0.0 for words in (first, second))
    expected = 2 * precision * recall / (precision + recall) if shared else float(first == second)
    assert score("rouge", " ".join(first), " ".join(second)) == pytest.approx(expected)


@given(WORDS, WORDS)
def test_f1_counts_each_word_as_often_as_it_occurs(first: list[str], second: list[str]) -> None:
    left, shared = list(second), 0
    for word in first:
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = (shared / len(words) if words else 0.0 for words in (first, second))
    expected = 2 * precision * recall / (precision + recall) if shared else float(first == second)
    assert score("f1", "The " + ", ".join(first).upper(), " ".join(second) + ".") == pytest.approx(expected if first and second else 0.0)


@given(TEXTS, TEXTS)
def test_every_score_is_from_0_to_1_and_1_for_the_reference_itself(answer: str, reference: str) -> None:
    for name in BUILT_IN:
        assert 0.0 <= score(name, answer, reference) <= 1.0
        if not name.startswith("json"):
            assert score(name, reference, reference) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("Paris", " Paris\n", 1, 1),
        ("two  words", "two\nwords", 1, 1),
        ("paris", "Paris", 0, 1),
        ("The cat.", "cat", 0, 1),
        ("cafe\u0301", "caf\u00e9", 1, 1),
        ("A", "B", 0, 0),
        ("A", "The", 0, 0),
        ("+", "-", 0, 0),
        ("", "Paris", 0, 0),
        ("", "", 1, 1),
        ("42", "43", 0, 0),
    ],
)
def test_exact_is_strict_but_for_white_space_and_f1_but_for_words(answer: str, reference: str, exact: int, f1: int) -> None:
    assert (score("exact", answer, reference), score("f1", answer, reference)) == (exact, f1)


@pytest.mark.parametrize(
    ("answer", "reference", "shared", "sizes"),
    [
        ("我爱北京", "我爱上海。", 2, (4, 4)),
        ("東京タワー", "京都タワー", 4, (5, 5)),
        ("ที่นี่", "ที่", 1, (2, 1)),  # consonants with their vowels
        ("iPhone手机", "手机 iphone", 3, (3, 3)),
        ("мир труд", "Труд, май", 1, (2, 2)),
    ],
)
def test_scripts_without_spaces_count_characters(answer: str, reference: str, shared: int, sizes: tuple[int, int]) -> None:
    assert score("f1", answer, reference) == pytest.approx(2 * shared / sum(sizes))


@pytest.mark.parametrize(
    "text", ['{"a": 1', "{'a': 1}", '```json\n{"a": 1}\n```', '{"a": NaN}', '{"a": 1, "a": 2}', "", "so: {}", "[" * 100_000]
)
def test_what_is_not_json_is_0(text: str) -> None:
    assert score("json", text, "{}") == 0.0 and score("json_equal", text, text) == 0.0


@pytest.mark.parametrize(
    ("answer", "equal"),
    [('{"b":[1.0,true],"a":"x"}', 1), ('{"a": "x", "b": [1, 1]}', 0), ('{"a": "x", "b": [true, 1]}', 0), ('{"a": "x"}', 0), ("[]", 0)],
)
def test_json_is_equal_by_value(answer: str, equal: int) -> None:
    reference = '{"a": "x", "b": [1, true]}'
    assert score("json", answer, reference) == 1.0 and score("json_equal", answer, reference) == equal


@given(st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)))
def test_any_json_value_equals_itself_in_another_spelling(value) -> None:
    assert score("json_equal", json.dumps(value, indent=2, ensure_ascii=False), json.dumps(value)) == 1.0


def metric_in(folder: Path, text: str, name: str = "score"):
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return open_metric(f"{path}:{name}")


@pytest.mark.parametrize(
    ("signature", "value"),
    [
        ("answer, reference", "answer == 'a' and reference == 'r'"),
        ("answer, reference, prompt", "prompt == 'p'"),
        ("given, expected, question", "question == 'p'"),
        ("answer, reference, row", "row['id'] == 7"),
        ("answer, reference, meta: dict", "meta['id'] == 7"),
        ("answer, reference, threshold=0.5", "threshold == 0.5"),
        ("*texts", "texts == ('a', 'r')"),
    ],
)
def test_a_function_gets_what_its_parameters_ask_for(tmp_path: Path, signature: str, value: str) -> None:
    metric = metric_in(tmp_path, f"def score({signature}):\n    return {value}\n")
    assert metric.name == "score" and not metric.is_share
    assert metric.score("p", "a", "r", row={"id": 7}) == 1.0


def test_a_function_may_import_its_neighbours_and_return_a_number_of_numpy_or_torch(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("HALF = 0.5\n")
    for made in ("numpy.float32(HALF)", "torch.tensor(HALF)", "HALF"):
        text = f"import numpy, torch\nfrom neighbour_of_mine import HALF\ndef score(answer, reference):\n    return {made}\n"
        assert metric_in(tmp_path, text).score("", "", "") == 0.5


@pytest.mark.parametrize("made", ["None", "'0.5'", "float('nan')", "float('inf')", "[1]", "1j", "1 / 0", "reference.x", "exit(3)"])
def test_a_bad_score_names_the_row_and_the_function(tmp_path: Path, made: str) -> None:
    metric = metric_in(tmp_path, f"def score(answer, reference):\n    return {made}\n")
    with pytest.raises(ConfigError) as caught:
        metric.score("p", "a", "r", where="chats.jsonl:3")
    text = str(caught.value)
    assert "evaluation.metric-failed" in text and "chats.jsonl:3" in text and "score" in text and "mine.py" in text


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def score(answer): return 1", "score", "(answer, reference)"),
        ("def score(answer, reference, a, b): return 1", "score", "(answer, reference)"),
        ("async def score(answer, reference): return 1", "score", "async"),
        ("def score(answer, reference): return 1", "scoer", "--metric"),
        ("score = 3", "score", "no function"),
        ("import no_such_module_here", "score", "no_such_module_here"),
        ("def score(:", "score", "SyntaxError"),
        ("raise SystemExit(0)", "score", "SystemExit"),
    ],
)
def test_a_function_that_cannot_be_a_metric_is_refused_before_anything_is_measured(tmp_path: Path, text: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        metric_in(tmp_path, text, name)
    assert "evaluation.metric-unreadable" in str(caught.value) and said in str(caught.value)


def test_a_file_without_a_function_is_asked_for_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(answer, reference): return 1")
    with pytest.raises(ConfigError, match=r"mine\.py:score"):
        open_metric(str(tmp_path / "mine.py"))
    with pytest.raises(ConfigError, match="no such file"):
        open_metric(str(tmp_path / "other.py:score"))


@pytest.mark.parametrize(
    ("name", "hint"), [("exat", "--metric exact"), ("rogue", "--metric rouge"), ("", None), (string.punctuation, None)]
)
def test_an_unknown_metric_names_the_known_ones(name: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        open_metric(name)
    (problem,) = caught.value.problems
    assert problem.code == "evaluation.unknown-metric" and problem.hint == hint and all(known in problem.message for known in BUILT_IN)
