"""F1 and F8 with two processes: one or both are killed at any instant of a save beside the training, or asked to stop in it."""

import functools
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from tests.support.disturbed import Straight, committed, forget, moments
from tests.support.pair_of_ranks import Pair
from tests.support.projects import Prompt, wait_until

TWO = ("train", "chats.jsonl", "--method", "full", "--max-steps", "6", "--world-size", "2")
OFTEN = ("--set", "checkpoint.every=2 steps", "--set", "checkpoint.keep_last=2", "--set", "checkpoint.keep_best=0")
"""6 steps; checkpoints after 2, 4 and 6, of which both ranks write files."""
PLACEMENTS = ("replicate", "shard")
SLOW = {"SLOW_SAVES": "0.02"}
"""A save takes longer than the steps beside it, so that nearly every instant is one inside a save."""


def words(placement: str) -> tuple[str, ...]:
    return (*TWO, *OFTEN, "--set", f"distributed.strategy={placement}")


@pytest.fixture(scope="module")
def straight_of(make_project, prompts: tuple[Prompt, Prompt], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Straight]:
    """The undisturbed run with a placement, and how long it saves."""

    @functools.cache
    def undisturbed(placement: str) -> Straight:
        pair, began = Pair(make_project(tmp_path_factory.mktemp(placement) / "project"), prompts), []
        answers = pair.type(*words(placement), variables=(SLOW, SLOW), meanwhile=lambda: began.append(first_save(pair)))
        assert [answer.status for answer in answers] == [0, 0], [answer.err for answer in answers]
        assert "saves-in-the-loop" not in [event["kind"] for event in pair.run.lines("events")]
        return Straight(pair.run.weights(), moments(pair.project), time.monotonic() - began[0])

    return undisturbed


def first_save(pair: Pair) -> float:
    """The moment at which the first save has begun."""
    runs = pair.project.folder / "output/runs"
    wait_until(lambda: list(runs.glob("*/checkpoint-*")) or (runs.is_dir() and not pair.is_running()), seconds=120)
    return time.monotonic()


def ends_like(pair: Pair, straight: Straight, placement: str) -> None:
    """Go on, or begin again where nothing is saved; the end is that of the undisturbed run."""
    whole = committed(pair.project)
    for answer in pair.type(*(("train-resume", "latest") if whole else words(placement))):
        answer.expect(0)
    assert pair.run.weights() == straight.weights and moments(pair.project) == straight.moments
    assert not list(pair.run.root.glob("*.tmp")) and not list(pair.run.root.glob(".trash*"))
    assert list(pair.run.by_step("train/loss")) == list(range(1, 7))


INSIDE = "llamahome.durable:_observe?checkpoint-"
PLACES = {
    "rank 0 before the commit": ("replicate", [0], (("llamahome.durable:rename?checkpoint-4", 1),)),
    "rank 1 between its part and the commit": ("replicate", [1], (("llamahome.checkpoint.collective_save:_on_all", 8),)),
    "both between their parts and the commit": ("shard", [0, 1], (("llamahome.checkpoint.collective_save:_on_all", 6),)),
}
"""Placement, who is killed, and where: `_on_all` is called three times in a save."""


@pytest.mark.medium
@pytest.mark.parametrize("place", PLACES)
def test_kill_9_of_one_or_both_processes_inside_a_save_costs_nothing(
    pair: Pair, straight_of: Callable[[str], Straight], place: str
) -> None:
    placement, ranks, where = PLACES[place]
    strikes = tuple([(*each, ["SIGKILL"]) for each in where] if rank in ranks else [] for rank in (0, 1))
    answers = pair.type(*words(placement), at=strikes)
    for rank, answer in enumerate(answers):
        assert answer.status == -9 if rank in ranks else (answer.status == 4 and answer.codes == ["distributed.peer-lost"]), answer.err
    assert ranks != [1] or list(pair.run.root.glob("*.tmp")) == [], "rank 0 removes what can no longer be committed"
    ends_like(pair, straight_of(placement), placement)


@pytest.mark.slow
def test_a_request_to_stop_inside_a_save_costs_nothing(pair: Pair, straight_of: Callable[[str], Straight]) -> None:
    answers = pair.type(*words("shard"), variables=(SLOW, SLOW), at=([(INSIDE, 5, ["SIGTERM"])], []))
    assert [answer.status for answer in answers] == [75, 75], [answer.err for answer in answers]
    ends_like(pair, straight_of("shard"), "shard")


@pytest.mark.slow
def test_two_processes_killed_or_stopped_at_random_instants_of_saves_cost_nothing(
    pair: Pair, straight_of: Callable[[str], Straight]
) -> None:
    kinds, under_way, runs = Counter(), [], pair.project.folder / "output/runs"
    for number in range(24):
        placement, source = PLACEMENTS[number % 2], random.Random(number)
        ranks, sent = [([0], "SIGKILL"), ([1], "SIGKILL"), ([0, 1], "SIGKILL"), ([source.randrange(2)], "SIGTERM")][number // 2 % 4]
        instant = source.uniform(0.0, 0.9 if sent == "SIGKILL" else 0.5) * straight_of(placement).seconds

        def strike(ranks=ranks, sent=sent, instant=instant) -> None:
            first_save(pair)
            time.sleep(instant)
            under_way.append(bool(list(runs.glob("*/checkpoint-*.tmp"))))
            pair.kill(ranks, sent)

        answers = pair.type(*words(placement), variables=(SLOW, SLOW), meanwhile=strike)
        statuses = [answer.status for answer in answers]
        assert all("Traceback" not in answer.err for answer in answers), [answer.err for answer in answers]
        if 0 in statuses:
            kinds["finished"] += 1
        elif sent == "SIGTERM":
            assert statuses == [75, 75], [answer.err for answer in answers]
            kinds["saved"] += 1
        else:
            assert all(statuses[rank] == -9 for rank in ranks) and set(statuses) <= {-9, 4}, [answer.err for answer in answers]
            kinds[f"killed {ranks}"] += 1
        ends_like(pair, straight_of(placement), placement)
        forget(pair.project)
    print(f"F1 and F8, two processes: {dict(kinds)}; a save was under way at {sum(under_way)} of these {len(under_way)} instants")
    assert len(under_way) == 24 and kinds["finished"] <= 8 and sum(under_way) >= 12
