"""An alert about one step names the rows of that step."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.models import examples_of, save_tiny
from tests.support.runs import RunOptions, close_run, make_learner, make_run, table_of

from llamahome.monitoring.alerts import alert_fields
from llamahome.monitoring.episodes import Alert
from llamahome.training.loop import train
from llamahome.training.run import first_state

ROWS = table_of(examples_of([9, 25, 14, 3, 30, 7, 18, 11, 22, 6], seed=1))


@pytest.mark.parametrize("log", ["1 step", "6 steps"])
def test_an_alert_about_a_spike_names_the_rows_of_the_step_with_the_highest_loss(tmp_path: Path, log: str) -> None:
    learner, plan = make_learner(save_tiny(tmp_path / "llama", "llama"), "lora"), RunOptions(ROWS, tmp_path, steps=6, log_every=log)
    plan.objective = lambda batch: learner.objective.loss_sum(batch) * (50 if made.recorder.step == 3 else 1)
    made = make_run(learner, plan)

    class Alarm:
        def log(self, step: int, t: float, metrics: Mapping[str, float]) -> None:
            if metrics["train/loss"] > 20:
                alert = Alert(name="loss-spike", step=step, text="a spike", help="nothing")
                for name in ("loss-spike", "clipping"):
                    made.recorder.event("alert", **alert_fields(replace(alert, name=name), made.recorder.standing_out))

        def close(self) -> None:
            pass

    made.recorder.attach(Alarm())
    train(made, first_state(plan.micro_batch_tokens))
    close_run(made)
    written = [json.loads(line) for line in (tmp_path / "metrics/events.jsonl").read_text().splitlines()]
    spike, clipping = [event for event in written if event["kind"] == "alert"]
    assert spike["rows"] == plan.names_of(12, 16) and "show" in spike and "rows" not in clipping
    assert made.recorder.standing_out() == {}, "a later alert is not about these rows"
