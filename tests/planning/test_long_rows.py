"""A long row takes the memory that is planned, `plan` names the longest one that fits, and a longer one is refused with that number."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.support.models import CPU, backend_named, our_model, save_tiny
from tests.support.projects import chats, write_rows

from llamahome import pass_memory
from llamahome.cli.app import app
from llamahome.config.schema import Config
from llamahome.distributed.world import World
from llamahome.errors import OutOfMemory
from llamahome.model.backends.file_store import FileStore
from llamahome.model.place import ChosenStrategy, longest_pass
from llamahome.pass_memory import resolve_memory
from llamahome.training.loaded_model import BaseModel

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, 0, CPU, 1)
FREE = 200 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_row_is_that_of_the_plan(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.long_rows", str(tmp_path), "3072", "6144"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["taken"] == pytest.approx(found["planned"], rel=0.15)
    whole_block = 6144 * 4096 * 4 * 3
    assert max(found["taken"]) < whole_block, "a block that ran on the whole row would take this alone: gate, up and their product"


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    folder = save_tiny(tmp_path / "tiny")
    return BaseModel(folder, our_model(folder), backend_named("cpu"), ChosenStrategy("replicate", "a test"), [], None)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("recomputes", [True, False, "auto"])
def test_a_row_that_does_not_fit_is_refused_with_the_length_that_does(
    base: BaseModel, recomputes: bool | str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_memory, "free_bytes", lambda backend, world: FREE)
    values: dict[str, Any] = {"gradient_checkpointing": recomputes, "objective": objective}
    config = Config.model_validate({"training": values, "data": {"max_length": 2**20}})

    def resolve(longest: int) -> None:
        resolve_memory(config, base, ALONE, longest=longest, compiled=False, say=lambda line: None)

    with pytest.raises(OutOfMemory) as caught:
        resolve(2**20)
    (problem,) = caught.value.problems
    fitting = int(re.findall(r"data.max_length=(\d+)", problem.hint or "")[0])
    assert problem.code == "training.row-too-long" and f"rows of up to {fitting:,} tokens fit" in problem.message
    assert ("gradient_checkpointing=true" in (problem.hint or "")) == (recomputes is False)
    resolve(fitting)
    with pytest.raises(OutOfMemory):
        resolve(round(1.2 * fitting))


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    monkeypatch.setattr(pass_memory, "free_bytes", lambda backend, world: FREE)
    folder = save_tiny(tmp_path / "deep", num_hidden_layers=12)
    return BaseModel(folder, our_model(folder), backend_named("cpu"), ChosenStrategy("replicate", "a test"), [], None)


def resolved(base: BaseModel, longest: int, said: list[str] | None = None, **training: Any) -> dict[str, Any]:
    config = Config.model_validate({"training": training, "data": {"max_length": 2**20}})
    found = resolve_memory(config, base, ALONE, longest=longest, compiled=False, say=(said if said is not None else []).append)
    return {key.removeprefix("training."): value for key, (value, _) in found.items()}


def longest_that_fits(base: BaseModel, **training: Any) -> int:
    with pytest.raises(OutOfMemory) as caught:
        resolved(base, 2**20, **training)
    return int(re.findall(r"data.max_length=(\d+)", caught.value.problems[0].hint or "")[0])


@pytest.mark.medium
def test_inputs_of_layers_are_moved_only_if_the_longest_row_does_not_fit_otherwise(deep: BaseModel) -> None:
    stays, moves = (longest_that_fits(deep, activation_offloading=each) for each in (False, "auto"))
    assert moves > 1.1 * stays
    assert resolved(deep, stays)["activation_offloading"] is False
    said: list[str] = []
    assert resolved(deep, moves, said)["activation_offloading"] is True
    assert any(line.startswith("activation offloading on: inputs of layers, ") for line in said)
    assert "activation_offloading" not in resolved(deep, moves, activation_offloading=True), "as set"
    with pytest.raises(OutOfMemory):
        resolved(deep, moves, activation_offloading=False)
    with pytest.raises(OutOfMemory):
        resolved(deep, round(1.2 * moves))


@pytest.mark.medium
def test_offloading_that_is_set_recomputes_layers(deep: BaseModel) -> None:
    found = resolved(deep, 64, activation_offloading=True)
    assert found["gradient_checkpointing"] is True and "activation_offloading" not in found
    assert resolved(deep, 64)["gradient_checkpointing"] is True, "rows may be as long as data.max_length"


def test_a_disk_without_room_is_no_place_for_inputs_of_layers(deep: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = longest_that_fits(deep)
    monkeypatch.setattr(FileStore, "free_bytes", lambda store: 1 << 20)
    assert longest_that_fits(deep) < moves
    with pytest.raises(OutOfMemory) as caught:
        resolved(deep, moves, activation_offloading=True)
    assert caught.value.problems[0].code == "training.no-room-to-offload"


def test_inputs_of_sharded_weights_stay(deep: BaseModel) -> None:
    said: list[str] = []
    sharded = replace(deep, strategy=ChosenStrategy("shard", "a test"))
    assert resolved(sharded, 64, said, activation_offloading=True)["activation_offloading"] is False
    assert said[-1].startswith("activation offloading off: sharded weights")


@pytest.mark.parametrize(("fitting", "found"), [(0, 0), (1, 1), (617, 617), (1000, 1000), (5000, 1000)])
def test_the_longest_pass_is_found(fitting: int, found: int) -> None:
    assert longest_pass(lambda tokens: tokens <= fitting, most=1000) == found


def test_the_plan_names_the_longest_row_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llamahome.planning.estimate.free_bytes", lambda backend, world: FREE)
    save_tiny(tmp_path / "tiny")
    write_rows(tmp_path / "chats.jsonl", chats(10))

    def plan(*words: str) -> str:
        settings = ["--set", "training.micro_batch_tokens=256", "--set", "training.compile=false", "--set", "data.eval_split=0"]
        result = CliRunner().invoke(app, ["plan", "chats.jsonl", "--model", "tiny", *settings, *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    longest = json.loads(plan("--json"))["longest_row_tokens"]
    text = plan("--set", f"data.max_length={longest}")
    assert f"rows of up to {longest:,} tokens fit" in text and "it fits;" in text
    assert "it does not fit" in plan("--set", f"data.max_length={longest + 1}")
