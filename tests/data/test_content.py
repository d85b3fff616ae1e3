"""How much rows hold to learn, and the share of it that is each row's own, against a slow count by hand."""

import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.data.content import content_of
from llamahome.data.records import Example
from llamahome.data.store.counts import OUTCOMES
from llamahome.data.store.table import ExampleTable, RowRead, build_table

Row = list[list[tuple[int, bool]]]
"""Examples of tokens and whether each is a target."""
EXAMPLES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8)
ROWS = st.lists(st.lists(EXAMPLES, max_size=2), min_size=1, max_size=6)


def table_of(rows: list[Row]) -> ExampleTable:
    read = []
    for number, row in enumerate(rows):
        columns = [tuple(zip(*example, strict=True)) for example in row]
        some = [Example("a", number, number + 1, np.array(ids, np.int32), np.array(learned, np.bool_)) for ids, learned in columns]
        read.append(RowRead(some, OUTCOMES[0]))
    return build_table(read, ("a",))


def answered(*answers: list[int]) -> list[Row]:
    """Rows of one example each: a question of the row alone, then its answer."""
    return [[[(1000 + number, False), (7, False), *((token, True) for token in answer)]] for number, answer in enumerate(answers)]


def by_hand(rows: list[Row]) -> tuple[float, float]:
    """Targets of an average row, and the share of its own."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for row in rows:
        answer = tuple(token for example in row for token, learned in example if learned)
        for example in row:
            before: tuple[int, ...] = ()
            for token, learned in example:
                before = (*before, token) if learned else ()
                if learned:
                    found.append((before[-3:], answer))
    answers = defaultdict(set)
    for key, answer in found:
        answers[key].add(answer)
    own = sum(len(answers[key]) == 1 for key, _ in found)
    return len(found) / len(rows), own / len(found) if found else 1.0


@given(rows=ROWS)
def test_the_content_of_rows_is_what_counting_by_hand_finds(rows: list[Row]) -> None:
    content = content_of(table_of(rows))
    assert (content.targets, content.own) == pytest.approx(by_hand(rows))


@given(rows=ROWS, seed=st.randoms())
def test_the_order_of_rows_and_copies_of_all_of_them_change_nothing(rows: list[Row], seed: random.Random) -> None:
    content, mixed = content_of(table_of(rows)), [*rows, *rows]
    seed.shuffle(mixed)
    again = content_of(table_of(mixed))
    assert (again.targets, again.own) == pytest.approx((content.targets, content.own))


def test_a_manner_is_shared_and_a_text_of_its_own_is_not() -> None:
    manner = [[1, 2, 3, 4, 100 + number, 5, 6, 7, 8] for number in range(50)]
    texts = [[10 * number + step for step in range(9)] for number in range(50)]
    assert content_of(table_of(answered(*manner))).own == pytest.approx(3 / 9)
    assert content_of(table_of(answered(*texts))).own == 1


def test_equal_answers_to_other_questions_are_one_answer() -> None:
    assert content_of(table_of(answered([1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]))).own == 1


def test_token_ids_of_a_large_vocabulary_are_told_apart() -> None:
    assert content_of(table_of(answered([262_143, 1, 2], [262_142, 1, 2]))).own == 1
    assert content_of(table_of(answered([262_143, 1, 2, 9], [262_143, 1, 2, 8]))).own == pytest.approx(1 / 4)


def test_more_rows_than_are_compared_change_the_length_alone() -> None:
    first, more = [[10 * number + step for step in range(9)] for number in range(100)], [list(range(99)) for _ in range(100)]
    content = content_of(table_of(answered(*first, *more)))
    assert (content.targets, content.own) == ((9 + 99) / 2, 1)
