"""DPO on rows like UltraFeedback's, prompts as long as answers: llamahome beside TRL's DPOTrainer, interleaved, in one run.

    python -m benchmarks.preferences --trl /tmp/trl [--rows 300] [--peer-rows 48] [--rounds 2] [--batch-sizes 1 2 4]

Both train a LoRA adapter of rank 16 on every linear layer of the starter, with the same rows, 8 pairs a step, in bfloat16. llamahome trains
one pass over --rows pairs; its seconds are those of its steps, without the first, and those of the reference, which it computes before.
TRL computes the reference in every step, with the adapter switched off; its seconds are those of the steps over --peer-rows pairs, without
the first, for each of --batch-sizes pairs per pass. Prints pairs/s, tokens/s (of both answers, each with its prompt) and the peak of the
resident memory. --trl is a folder with TRL and what it needs: pip install --target /tmp/trl --no-deps trl datasets accelerate multiprocess
"dill<0.4.2" xxhash pandas fsspec python-dateutil six pytz tzdata
"""

import argparse
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = "data/models/base/smollm2-135m-instruct"
BATCH = 8


def make_rows(count: int, *, words: int = 180) -> list[dict[str, str]]:
    """Pairs of random English words; prompt and answers have about 200 tokens each."""
    random_, vocabulary = random.Random(0), (Path(__file__).read_text() + Path(random.__file__).read_text()).split()
    plain = sorted({word.lower() for word in vocabulary if word.isalpha()})

    def text() -> str:
        return " ".join(random_.choices(plain, k=random_.randint(words // 2, words * 3 // 2)))

    return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)]


def run_ours(rows: Path, scratch: Path) -> dict[str, float]:
    """One pass over all rows."""
    output, count = scratch / "ours", len(rows.read_text().splitlines())
    subprocess.run(["rm", "-rf", str(output), str(scratch / "data")], check=True)
    words = ["train", str(rows), "--model", str(Path(BASE).resolve()), "--output", str(output), "--epochs", "1"]
    settings = ["training.objective=dpo", f"training.batch_size={BATCH}", "data.eval_split=0", "evaluation.sample_prompts=0"]
    command = [sys.executable, "-m", "llamahome", *words, *(word for setting in settings for word in ("--set", setting))]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=True)
    (path,) = scratch.glob("data/metrics/logs/*/metrics.jsonl")
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if "time/forward" in line]
    seconds = [sum(line[f"time/{part}"] for part in ("data", "forward", "backward", "exchange", "update")) for line in lines]
    minutes, second = re.findall(r"training answers computed in (\d+):(\d+)", done.stderr)[0]
    reference = (60 * int(minutes) + int(second)) * BATCH / count  # of a step
    return {
        "steps": BATCH / statistics.median(seconds[1:]),
        "pairs_per_s": BATCH / (statistics.median(seconds[1:]) + reference),
        "tokens_per_pair": lines[-1]["train/tokens"] / count,
        "peak_bytes": max(line["memory/peak"] for line in lines),
    }


def run_trl(rows: Path, batch_size: int, folder: str) -> dict[str, float]:
    """The process that trains with TRL."""
    sys.path.insert(0, folder)
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    chats = [
        {"prompt": [{"role": "user", "content": pair["prompt"]}]}
        | {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
        for pair in pairs
    ]
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=BATCH // batch_size,
        num_train_epochs=1,
        max_length=2048,
        bf16=False,  # the weights are bfloat16 already, which is faster on a processor than autocast
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16),
        args=arguments,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"pairs_per_s": BATCH / statistics.median(seconds), "peak_bytes": peak}


def main() -> None:
    """Measure, print every result as a line of JSON, then the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl", required=True)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--peer-rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--peer", type=Path, help="rows for the process that trains with TRL")
    given = parser.parse_args()
    if given.peer is not None:
        print(json.dumps(run_trl(given.peer, given.batch_sizes[0], given.trl)))
        return
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps(row) + "\n" for row in make_rows(given.rows)]
        ours, theirs = Path(folder, "pairs.jsonl"), Path(folder, "some.jsonl")
        ours.write_text("".join(lines))
        theirs.write_text("".join(lines[: given.peer_rows]))
        for _ in range(given.rounds):
            results.setdefault("llamahome", []).append(run_ours(ours, Path(folder)))
            print(json.dumps({"llamahome": results["llamahome"][-1]}), flush=True)
            for size in given.batch_sizes:
                command = [sys.executable, "-m", "benchmarks.preferences", "--trl", given.trl, "--peer", str(theirs)]
                done = subprocess.run([*command, "--batch-sizes", str(size)], capture_output=True, text=True, env=dict(os.environ))
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                results.setdefault(f"trl {size}", []).append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(json.dumps({f"trl {size}": results[f"trl {size}"][-1]}), flush=True)
    medians = {name: statistics.median(each["pairs_per_s"] for each in found) for name, found in results.items()}
    peaks = {name: max(each["peak_bytes"] for each in found) for name, found in results.items()}
    tokens = results["llamahome"][0]["tokens_per_pair"]
    best = max((name for name in medians if name != "llamahome"), key=lambda name: medians[name])
    for name, pairs in medians.items():
        print(f"{name:10} {pairs:6.3f} pairs/s  {pairs * tokens:8.1f} tokens/s  peak {peaks[name] / 2**30:.2f} GiB")
    print(f"llamahome / {best}: {medians['llamahome'] / medians[best]:.2f} x speed, {peaks['llamahome'] / peaks[best]:.2f} x memory")


if __name__ == "__main__":
    main()
