import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.checkpoints import state_at

from llamahome.checkpoint.state import read_state
from llamahome.errors import CheckpointError

FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@pytest.mark.medium
@settings(deadline=None, max_examples=50)
@given(
    step=st.integers(0, 2**60),
    best=st.none() | FINITE,
    loss=st.none() | FINITE,
    elapsed=FINITE,
    extra=st.dictionaries(st.text(), JSON, max_size=3),
)
def test_a_state_is_read_back_unchanged(tmp_path_factory, step, best, loss, elapsed, extra):
    path = tmp_path_factory.mktemp("state") / "trainer_state.json"
    state = state_at(step, best_loss=best, eval_loss=loss, elapsed_s=elapsed, extra=extra)
    path.write_text(state.to_json())
    assert read_state(path) == state


def test_every_wrong_field_is_named(tmp_path):
    path = tmp_path / "trainer_state.json"
    content = json.loads(state_at(5).to_json())
    del content["consumed"]
    content |= {"novel": 1, "step": "5", "bad_steps": True, "tokens": -1, "elapsed_s": None}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    messages = " ".join(problem.message for problem in caught.value.problems)
    assert all(f"'{name}'" in messages for name in ("consumed", "novel", "step", "bad_steps", "tokens", "elapsed_s"))
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_file_that_is_not_a_state_is_damaged(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "trainer_state.json")
    assert caught.value.problems[0].code == "checkpoint.damaged"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_values_that_json_cannot_represent_are_refused_at_writing(value):
    with pytest.raises((ValueError, TypeError)):
        state_at(1, extra={"x": value}).to_json()
