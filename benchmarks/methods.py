"""Speed and memory of every method of docs/Methods.md on the starter: one short run each, the same rows, beside plain LoRA.

    python -m benchmarks.methods FOLDER [--only "dpo;LoRA, nf4"] [--steps 4] [--rounds 1]

FOLDER keeps rows, runs and prepared data; a second call uses the quantised copies, reference values and teacher values of the first. Every
method trains steps of 8 rows (pairs, answers) with prompts and answers of about 120 tokens each; the median of the steps without the first
counts, and the largest peak of the resident memory. Tokens are those that a step computes with: of a pair the prompt once, of grpo the
answers that it draws. Prints a Markdown table.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.preferences import make_rows

BASE = Path("data/models/base/smollm2-135m-instruct")
ROWS, BATCH = 48, 8
REWARD = "def score(answer, reference):\n    return float(answer.count('e')) / (1 + len(answer))\n"


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    settings: tuple[str, ...] = ()
    rows: str = "chats"
    full: bool = False


METHODS = {
    "LoRA": Method(),
    "LoRA, DoRA": Method(("lora.use_dora=true",)),
    "VeRA, rank 256": Method(("lora.use_vera=true", "lora.rank=256")),
    "LoRA, pissa_niter_4": Method(("lora.init=pissa_niter_4",)),
    "LoRA, nf4": Method(("model.quantization=nf4",)),
    "LoRA, int8": Method(("model.quantization=int8",)),
    "dpo": Method(("training.objective=dpo",), "pairs"),
    "ipo": Method(("training.objective=ipo",), "pairs"),
    "orpo": Method(("training.objective=orpo",), "pairs"),
    "simpo": Method(("training.objective=simpo",), "pairs"),
    "kto": Method(("training.objective=kto",), "labelled"),
    "distill": Method(("training.objective=distill", "distill.teacher=taught")),
    "grpo, 4 prompts of 8 answers": Method(
        ("training.objective=grpo", "grpo.reward=reward.py:score", "training.batch_size=4", "grpo.max_new_tokens=32")
    ),
    "full, adamw": Method(full=True),
    "full, adamw_8bit": Method(("training.optimizer=adamw_8bit",), full=True),
    "full, adafactor": Method(("training.optimizer=adafactor",), full=True),
    "full, muon": Method(("training.optimizer=muon",), full=True),
}


def write_project(folder: Path) -> None:
    """The rows of all methods: chats, pairs and labelled answers with the same texts, and a reward."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, random_ = make_rows(ROWS, words=100), random.Random(1)
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    labelled = [{**row, "label": random_.random() < 0.5} for row in chats]
    for name, rows in {"pairs": pairs, "chats": chats, "labelled": labelled}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


def llamahome(folder: Path, *words: str) -> None:
    """Run a command of llamahome in the folder."""
    done = subprocess.run([sys.executable, "-m", "llamahome", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-2000:]}")


def measure(folder: Path, name: str, *, steps: int) -> tuple[float, float, int]:
    """Seconds of a step, tokens a second, and the peak of the resident memory in bytes."""
    method, model = METHODS[name], str(BASE.resolve())
    if name == "distill" and not (folder / "taught").exists():
        llamahome(folder, "data", "teach", "chats.jsonl", "--teacher", model, "--model", model, "--output", "taught")
    run = folder / "runs" / f"{len(list((folder / 'runs').glob('*'))):03}"
    fixed = (f"training.batch_size={BATCH}", "data.eval_split=0", "evaluation.sample_prompts=0", "checkpoint.every=24 h")
    words = ["train", f"{method.rows}.jsonl", "--model", model, "--output", str(run), "--max-steps", str(steps)]
    words += ["--method", "full"] if method.full else []
    llamahome(folder, *words, *(word for each in (*fixed, *method.settings) for word in ("--set", each)))
    identity = (run / "run_id").read_text(encoding="utf-8").strip()
    text = (folder / "data/metrics/logs" / identity / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "time/forward" in line]
    parts = ("data", "rollout", "forward", "backward", "exchange", "update")
    seconds = [sum(line.get(f"time/{part}", 0.0) for part in parts) for line in lines]
    tokens = [line["train/tokens"] - before for line, before in zip(lines, [0, *(each["train/tokens"] for each in lines)], strict=False)]
    rates = [count / taken for count, taken in zip(tokens, seconds, strict=True)]
    return statistics.median(seconds[1:]), statistics.median(rates[1:]), max(line["memory/peak"] for line in lines)


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names of the table, separated by semicolons")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    write_project(folder)
    names = asked.only.split(";") if asked.only else list(METHODS)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    for _ in range(asked.rounds):
        for name in names:
            found[name].append(measure(folder, name, steps=asked.steps))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    print("| method | seconds a step | tokens/s | peak memory |\n|---|---|---|---|")
    for name, rounds in found.items():
        step, rate = (statistics.median(each[place] for each in rounds) for place in (0, 1))
        print(f"| {name} | {step:.2f} | {rate:,.0f} | {max(each[2] for each in rounds) / 1e9:.2f} GB |")


if __name__ == "__main__":
    main()
