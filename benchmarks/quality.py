"""The quality part: the same rows once in the same order by llamahome as it is and by TRL in float32, then one judge for both.

A faster run whose loss leaves the band does not count.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.client import SystemFailed, Trainer, environment
from benchmarks.environments import NotInstalled, python_of
from benchmarks.rows import scenario
from benchmarks.speed import make_rows, say, task_of
from benchmarks.systems import System, precise, system

REFERENCE = System("trl-fp32", "TRL 1.16, float32", "trl", {"micro_batch": 1, "bf16": False, "checkpointing": False, "padding_free": False})
BAND = 0.005
"""Relative difference of the held-out loss beyond which a faster run does not count."""


def measure(method: str, *, rows: int, held: int, cache: Path, model: str, bf16: bool) -> dict[str, Any]:
    """Held-out loss before, after llamahome, after TRL; or why there is none."""
    folder, one = cache / "work" / f"quality-{method}", scenario("docstrings")
    shutil.rmtree(folder, ignore_errors=True)
    steps = max(1, rows // one.batch)
    counted = make_rows(one, folder / "data", rows=steps * one.batch, model=model)
    make_rows(one, folder / "held", rows=held, model=model, skip=steps * one.batch)
    told: dict[str, Any] = {"method": method, **counted, "held_out": held, "steps": steps, "systems": {}}
    try:
        for each in (precise(system("ours"), bf16=bf16), REFERENCE):
            say(f"quality {method}: {each.title}, {steps} steps")
            task = task_of(each, one, method, data=folder / "data", model=model)
            trainer = Trainer(python_of(each.peer, cache), each.peer, task, folder / each.name)
            try:
                trainer.wait_until_ready()
                done = trainer.go(steps)
                if each.peer == "ours":
                    trainer.finish()
                else:
                    trainer.command("save")
            finally:
                trainer.close()
            told["systems"][each.name] = {
                "losses": [step["loss"] for step in done["steps"]],
                "hash": done["hash"],
                "seconds": done["seconds"],
            }
        models = {"before": model, "ours": str(folder / "ours/output/training/final"), "trl-fp32": str(folder / "trl-fp32/trained")}
        for name, trained in models.items():
            loss = _judged(trained, folder, cache, model)
            told["before" if name == "before" else name] = loss
            say(f"  held-out loss {name}: {loss:.4f}")
    except (SystemFailed, NotInstalled) as error:
        return {**told, "error": str(error)}
    told["difference"] = told["ours"] / told["trl-fp32"] - 1
    told["same_rows"] = told["systems"]["ours"]["hash"] == told["systems"]["trl-fp32"]["hash"]
    return told


def _judged(trained: str, folder: Path, cache: Path, model: str) -> float:
    """Mean loss per target on the held-out rows, in float32 by transformers alone."""
    task = folder / "judge.json"
    task.write_text(json.dumps({"model": model, "trained": trained, "rows": str(folder / "held/ids.jsonl")}), encoding="utf-8")
    words = [python_of("trl", cache), "-m", "benchmarks.peers.judge", str(task)]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemFailed(done.stderr.strip().splitlines()[-1])
    return float(json.loads(done.stdout.splitlines()[-1])["loss"])
