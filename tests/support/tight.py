"""What test_memory_of_a_group.py starts: python -m tests.support.tight FOLDER GROUP ROOM WATCH.

Trains in the memory control group GROUP, whose limit is set to what the loaded model takes and ROOM bytes more; WATCH is 1 or 0. Prints the
events and where the run ended.
"""

import json
import sys
from pathlib import Path

import torch
from tests.support.models import examples_of
from tests.support.runs import RunOptions, close_run, make_learner, make_run, table_of

from llamahome.model.load import decoder_layers
from llamahome.monitoring.resources import free_memory_bytes, memory_limit_bytes
from llamahome.training.loop import train
from llamahome.training.memory_watch import MemoryWatch
from llamahome.training.run import first_state

BUDGET = 16_384


def main(folder: Path, group: Path, room: int, *, watch: bool) -> None:
    learner = make_learner(folder / "base", "lora")
    small = make_run(learner, RunOptions(table_of(examples_of([32] * 8)), folder / "first", steps=1, micro_batch_tokens=64))
    train(small, first_state(64))  # so that what a first step loads is there
    close_run(small)
    (group / "memory.limit_in_bytes").write_text(str(int((group / "memory.usage_in_bytes").read_text()) + room))
    loss_sum = learner.objective.loss_sum
    if watch:
        loss_sum = MemoryWatch(free_memory_bytes, limit=memory_limit_bytes()).around(loss_sum, decoder_layers(learner.model))
    table = table_of(examples_of([256] * 64, seed=1))
    plan = RunOptions(
        table, folder / "run", steps=2, batch_size=64, micro_batch_tokens=BUDGET, objective=loss_sum, save=lambda state: folder
    )
    run = make_run(learner, plan)
    state = train(run, first_state(BUDGET)).state
    close_run(run)
    events = [json.loads(line) for line in (folder / "run/metrics/events.jsonl").read_text().splitlines()]
    print(json.dumps({"step": state.step, "budget": state.micro_batch_tokens, "events": [event["kind"] for event in events]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = Path(sys.argv[2])
    (group / "cgroup.procs").write_text("0")  # this process
    main(Path(sys.argv[1]), group, int(sys.argv[3]), watch=sys.argv[4] == "1")
