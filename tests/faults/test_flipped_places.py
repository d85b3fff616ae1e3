"""One bit changed at many random places of a checkpoint, files cut short, a shard gone: all are found, and the older one is taken."""

import random
from functools import partial
from pathlib import Path

import pytest
from tests.support.checkpoints import PRINTS, differences, save, save_step, state_at, tensors_at, write_model_of

from llamahome.checkpoint.store import choose, load
from llamahome.distributed import tensorfiles
from llamahome.errors import CheckpointError, Problem
from llamahome.rundir import RunPaths


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """Two checkpoints; the newer one has its optimizer in several files."""
    (tmp_path / "run").mkdir()
    run = RunPaths(tmp_path / "run", "20260101-000000-brisk-otter")
    save_step(run, 1)
    monkeypatch.setattr(tensorfiles, "plan_files", partial(tensorfiles.plan_files, largest=300))
    save(
        run,
        state=state_at(2),
        config_text="training: {seed: 2}\n",
        fingerprints=PRINTS,
        write_model=write_model_of(2),
        optimizer_tensors=tensors_at(2),
        optimizer_values={"lr": 1e-3, "betas": [0.9, 0.999]},
    )
    return run


def _missed(run: RunPaths, path: Path) -> list[str]:
    """What is wrong about how a damaged file of the newer checkpoint is treated."""
    problems: list[Problem] = []
    chosen = choose(run, warn=problems.append)
    named = any(
        problem.where in (str(path), str(path.parent)) and "used instead of checkpoint-2" in problem.message for problem in problems
    )
    wrong = [] if chosen == run.checkpoint(1) and named else [f"{path.name}: {chosen.name} is taken, {len(problems)} problems are named"]
    try:
        load(run.checkpoint(2))
        wrong.append(f"{path.name}: the damaged checkpoint loads")
    except CheckpointError as error:
        if error.problems[-1].hint != f"llamahome train-resume {run.checkpoint(1)}":
            wrong.append(f"{path.name}: the older checkpoint is not named")
    return wrong


def _flip(run: RunPaths, places: int, seed: int) -> list[str]:
    source, wrong = random.Random(seed), []
    contents = {path: path.read_bytes() for path in sorted(run.checkpoint(2).rglob("*")) if path.is_file()}
    ends = [path for path, content in contents.items() for _ in content]  # every byte of all files as likely as any other
    for _ in range(places):
        path = source.choice(ends)
        flipped = bytearray(contents[path])
        flipped[source.randrange(len(flipped))] ^= 1 << source.randrange(8)
        path.write_bytes(flipped)
        wrong += _missed(run, path)
        path.write_bytes(contents[path])
    assert differences(load(run.checkpoint(2))) == []
    return wrong


def test_sixty_flipped_bits_are_all_found(run: RunPaths) -> None:
    assert _flip(run, 60, seed=0) == []


@pytest.mark.slow
def test_two_thousand_flipped_bits_are_all_found(run: RunPaths) -> None:
    assert _flip(run, 2_000, seed=1) == []


def test_a_file_cut_anywhere_and_a_missing_shard_are_found(run: RunPaths) -> None:
    source = random.Random(2)
    files = [path for path in sorted(run.checkpoint(2).rglob("*")) if path.is_file()]
    assert sum(path.parent.name == "optimizer" and path.suffix == ".safetensors" for path in files) > 1
    for path in files:
        whole = path.read_bytes()
        for left in {0, len(whole) - 1, source.randrange(len(whole))}:
            path.write_bytes(whole[:left])
            assert _missed(run, path) == []
        path.unlink()
        problems: list[Problem] = []
        assert choose(run, warn=problems.append) == run.checkpoint(1) and problems
        path.write_bytes(whole)
    assert choose(run, warn=lambda problem: pytest.fail(problem.render())) == run.checkpoint(2)
