"""The quality part: llamahome and TRL in float32 train on the same rows in the same order; one evaluation measures both.

A faster run whose held-out loss differs by more than BAND does not count.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.client import SystemFailed, TrainerProcess, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.rows import scenario
from benchmarks.speed import make_rows, say, task_of
from benchmarks.systems import System, system, with_precision

REFERENCE = System("trl-fp32", "TRL 1.16, float32", "trl", {"micro_batch": 1, "bf16": False, "checkpointing": False, "padding_free": False})
BAND = 0.005
"""Largest accepted relative difference of the held-out loss."""


def measure(method: str, *, rows: int, held: int, cache: Path, model: str, bf16: bool) -> dict[str, Any]:
    """Measure the held-out loss before training, after llamahome and after TRL; or return the error."""
    folder, one = cache / "work" / f"quality-{method}", scenario("docstrings")
    shutil.rmtree(folder, ignore_errors=True)
    steps = max(1, rows // one.batch)
    counts = make_rows(one, folder / "data", rows=steps * one.batch, model=model)
    make_rows(one, folder / "held", rows=held, model=model, skip=steps * one.batch)
    result: dict[str, Any] = {"method": method, **counts, "held_out": held, "steps": steps, "systems": {}}
    try:
        for each in (with_precision(system("ours"), bf16=bf16), REFERENCE):
            say(f"quality {method}: {each.title}, {steps} steps")
            task = task_of(each, one, method, data=folder / "data", model=model)
            trainer = TrainerProcess(python_of(each.peer, cache), each.peer, task, folder / each.name)
            try:
                trainer.wait_until_ready()
                measured = trainer.run_steps(steps)
                if each.peer == "ours":
                    trainer.finish()
                else:
                    trainer.command("save")
            finally:
                trainer.close()
            result["systems"][each.name] = {
                "losses": [step["loss"] for step in measured["steps"]],
                "hash": measured["hash"],
                "seconds": measured["seconds"],
            }
        models = {"before": model, "ours": str(folder / "ours/output/training/final"), "trl-fp32": str(folder / "trl-fp32/trained")}
        for name, trained in models.items():
            loss = _held_out_loss(trained, folder, cache, model)
            result["before" if name == "before" else name] = loss
            say(f"  held-out loss {name}: {loss:.4f}")
    except (SystemFailed, NotInstalled) as error:
        return {**result, "error": str(error)}
    result["difference"] = result["ours"] / result["trl-fp32"] - 1
    result["same_rows"] = result["systems"]["ours"]["hash"] == result["systems"]["trl-fp32"]["hash"]
    return result


def _held_out_loss(trained: str, folder: Path, cache: Path, model: str) -> float:
    """Mean loss per target on the held-out rows, in float32 by transformers."""
    task = folder / "judge.json"
    task.write_text(json.dumps({"model": model, "trained": trained, "rows": str(folder / "held/ids.jsonl")}), encoding="utf-8")
    command = [python_of("trl", cache), "-m", "benchmarks.peers.judge", str(task)]
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemFailed(result.stderr.strip().splitlines()[-1])
    return float(json.loads(result.stdout.splitlines()[-1])["loss"])
