"""A profile of some steps: the trace and the table hold what was done in them, and the training is the same with and without it."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from tests.support.models import examples_of, save_tiny
from tests.support.runs import Learner, RunOptions, close_run, make_learner, make_run, table_of

from llamahome.model.backends.cuda.snapshot import observer
from llamahome.model.layer_kinds import adapter_ranks, layer_kinds
from llamahome.monitoring.profiler import ProfiledClock, ProfilePlan, StepProfiler
from llamahome.training.loop import train
from llamahome.training.run import first_state
from llamahome.units import parse_steps

ROWS = table_of(examples_of([9, 25, 14, 3, 30, 7, 18, 11, 22, 6], seed=1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def profiled(learner: Learner, folder: Path, first: int, last: int, **options: object) -> list[str]:
    """Train six steps with a profile of some of them; what it said."""
    said: list[str] = []
    plan = ProfilePlan(
        first, last, folder / "profile", kinds=lambda: layer_kinds(learner.model), ranks=adapter_ranks(learner.model), say=said.append
    )
    profiler = StepProfiler(plan, done=0)
    run = make_run(learner, RunOptions(ROWS, folder, **options))
    clock = ProfiledClock(time.perf_counter, lambda earlier, later: later - earlier, profiler, watch=lambda part: None)
    object.__setattr__(run, "clock", clock)
    try:
        train(run, first_state(60))
    finally:
        profiler.close()
        close_run(run)
    return said


def trace_of(folder: Path, name: str) -> list[dict]:
    with gzip.open(folder / "profile" / f"trace-{name}.json.gz") as file:
        return json.load(file)["traceEvents"]


def rows_of(folder: Path, name: str) -> dict[str, list[str]]:
    """Kind -> figures of the table."""
    lines = (folder / "profile" / f"table-{name}.txt").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.endswith("backward"))
    end = lines.index("", begin)
    return {line[:20].strip(): line[20:].split() for line in lines[begin + 1 : end]}


@pytest.fixture(scope="module")
def done(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Learner, Path, list[str]]:
    """A run of six steps, of which the third and the fourth were profiled."""
    folder, learner = tmp_path_factory.mktemp("profiled"), make_learner(llama, "lora")
    return learner, folder, profiled(learner, folder, 3, 4)


@pytest.mark.medium
def test_the_trace_holds_the_steps_and_their_parts(done: tuple[Learner, Path, list[str]]) -> None:
    _, folder, said = done
    events = trace_of(folder, "steps-3-4")
    assert sorted({event["name"] for event in events if event.get("name", "").startswith("step ")}) == ["step 3", "step 4"]
    by_name = {event["name"]: event for event in events if event.get("ph") == "X"}
    for part in ("data", "forward", "backward", "exchange", "update"):
        assert f"part: {part}" in by_name
    assert {"layer: attention", "layer: MLP", "layer: norm"} <= by_name.keys()
    assert said == [line for line in said if line.startswith("profiled the steps 3 to 4")] and len(said) == 1


def test_the_table_divides_the_whole_step_among_the_kinds_of_layers(done: tuple[Learner, Path, list[str]]) -> None:
    rows = rows_of(done[1], "steps-3-4")
    assert {"attention", "MLP", "norm", "LoRA", "head and loss", "optimizer", "exchange", "data"} <= rows.keys()
    for kind in ("attention", "MLP", "norm", "LoRA", "head and loss"):
        assert float(rows[kind][2]) > 0 and float(rows[kind][3]) > 0, f"{kind} has a forward and a backward time"
    assert rows["optimizer"][3] == rows["data"][3] == "-"
    first = (done[1] / "profile" / "table-steps-3-4.txt").read_text().splitlines()[0]
    wall = 1000 * float(first.split()[4])
    assert sum(float(figures[0]) for figures in rows.values()) == pytest.approx(wall, rel=0.05), "nothing counts twice or not at all"


def test_the_weights_are_the_same_with_and_without_a_profile(llama: Path, tmp_path: Path, done: tuple[Learner, Path, list[str]]) -> None:
    plain = make_learner(llama, "lora")
    run = make_run(plain, RunOptions(ROWS, tmp_path))
    train(run, first_state(60))
    close_run(run)
    assert all(torch.equal(weight, done[0].weights()[name]) for name, weight in plain.weights().items())


def test_starting_and_writing_the_profile_is_a_part_of_its_own_in_the_metrics(done: tuple[Learner, Path, list[str]]) -> None:
    records = [json.loads(line) for line in next(done[1].rglob("metrics.jsonl")).read_text().splitlines()]
    assert {record["step"]: record["time/profile"] > 0 for record in records if "time/profile" in record} == {3: True, 5: True}


def test_no_hook_stays_behind(done: tuple[Learner, Path, list[str]]) -> None:
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in done[0].model.modules())


def test_a_recomputed_forward_counts_for_its_layers(llama: Path, tmp_path: Path) -> None:
    profiled(make_learner(llama, "lora", checkpointing=True), tmp_path, 2, 2)
    rows = rows_of(tmp_path, "steps-2-2")
    assert float(rows["MLP"][3]) > 0 and float(rows["attention"][3]) > 0


def test_a_run_that_ends_within_the_steps_writes_what_was_done(llama: Path, tmp_path: Path) -> None:
    said = profiled(make_learner(llama, "full"), tmp_path, 6, 9)
    assert [line.split(",")[0] for line in said] == ["profiled the steps 6 to 6"]
    rows = rows_of(tmp_path, "steps-6-9")
    assert "LoRA" not in rows and float(rows["MLP"][3]) > 0


def test_steps_that_the_run_never_reaches_are_reported(llama: Path, tmp_path: Path) -> None:
    assert profiled(make_learner(llama, "lora"), tmp_path, 20, 25) == ["nothing was profiled: the run did none of the steps 20 to 25"]
    assert not (tmp_path / "profile").exists()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    (said,) = profiled(make_learner(llama, "lora"), tmp_path, 2, 2)
    assert "cannot be written" in said and "the training is not affected" in said


@pytest.mark.parametrize(("text", "steps"), [("steps 20-25", (20, 25)), ("step 7", (7, 7)), (" steps 1 - 50 ", (1, 50))])
def test_a_range_of_steps_is_read(text: str, steps: tuple[int, int]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["20-25", "steps 25-20", "steps 0-3", "steps 1-51", "steps", "steps 1.5-2", "10 min"])
def test_what_is_no_range_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"range of steps|more than 50 steps"):
        parse_steps(text)


def test_the_first_failed_allocation_alone_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own part needs a GPU; what it calls is tried here."""
    written: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    observe = observer(tmp_path / "profile" / "out-of-memory.pickle")
    observe(0, 10**9, 10**10, 10**8)
    observe(0, 10**9, 10**10, 10**8)
    assert written == [str(tmp_path / "profile" / "out-of-memory.pickle")] and (tmp_path / "profile").is_dir()
