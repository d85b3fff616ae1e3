"""Values of a sweep: what separates them, and what is refused before anything starts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.config.load import LoadedConfig, load_config
from llamahome.errors import LlamaHomeError
from llamahome.sweep.grid import make_grid, split_values, warnings_of

PLAIN = st.text("abc123.-_", min_size=1, max_size=6)
VALUE = st.one_of(
    PLAIN,
    st.lists(PLAIN, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
    st.lists(PLAIN, min_size=1, max_size=3).map(lambda parts: f"'{','.join(parts)}'"),
)


def load(assignments: list[str]) -> LoadedConfig:
    return load_config(assignments=assignments, environment={})


@given(st.lists(VALUE, min_size=1, max_size=5))
def test_commas_inside_lists_and_quotes_belong_to_their_value(values: list[str]) -> None:
    assert split_values(",".join(values)) == values


def test_every_combination_has_every_seed_and_its_own_number() -> None:
    grid = make_grid(["training.learning_rate=1e-5,1e-4", "lora.rank=8,16,32"], 2, load)
    seen = {(each.config.training.learning_rate, each.config.lora.rank, each.config.training.seed) for each in grid.loaded}
    assert seen == {(rate, rank, seed) for rate in (1e-5, 1e-4) for rank in (8, 16, 32) for seed in (0, 1)}
    assert [trial.number for trial in grid.trials] == list(range(1, 13))


def test_settings_without_effect_are_named_with_the_number_of_runs() -> None:
    message = "lora.rank 4 has no effect: training.method is full"
    assert warnings_of(make_grid(["training.method=full,lora", "lora.rank=4"], 1, load)) == [f"{message} (in 1 of 2 runs)"]
    assert warnings_of(make_grid(["training.method=full", "lora.rank=4"], 2, load)) == [message]
    assert warnings_of(make_grid(["lora.rank=4,8"], 1, load)) == []


@pytest.mark.parametrize(
    ("assignments", "hint"),
    [
        (["lora.rank=4,4,4"], "--set 'lora.rank=4' --seeds 2   compares two seeds; or list another value"),
        (["lora.rank=4,4,8"], "--set 'lora.rank=4,8'"),
        (["lora.rank=4,4", "training.learning_rate=1e-4,1e-3"], "--set 'lora.rank=4'"),
    ],
)
def test_a_value_that_is_listed_twice_is_one_problem_whose_hint_leaves_runs_to_compare(assignments: list[str], hint: str) -> None:
    with pytest.raises(LlamaHomeError) as caught:
        make_grid(assignments, 1, load)
    assert [problem.hint for problem in caught.value.problems] == [hint]


@pytest.mark.parametrize(
    ("assignments", "seeds", "codes"),
    [
        (["lora.rnk=8,16", "training.epochs=-1,2"], 1, {"config.unknown-key", "config.out-of-range"}),
        (["lora.rank=8,8.0"], 1, None),
        (["training.learning_rate=1e-4,0.0001"], 1, {"sweep.value-twice"}),
        (["lora.rank=8", "lora.rank=16"], 1, {"sweep.key-twice"}),
        (["training.seed=1,2"], 2, {"sweep.key-twice"}),
        (["lora.rank=8"], 1, {"sweep.one-run"}),
        (["training.seed=" + ",".join(map(str, range(40))), "lora.rank=" + ",".join(map(str, range(1, 40)))], 1, {"sweep.too-many"}),
    ],
)
def test_mistakes_are_refused_all_at_once(assignments: list[str], seeds: int, codes: set[str] | None) -> None:
    with pytest.raises(LlamaHomeError) as caught:
        make_grid(assignments, seeds, load)
    if codes is not None:
        assert {problem.code for problem in caught.value.problems} == codes
